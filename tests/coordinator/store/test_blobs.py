"""Blobs in a folder and in S3: whole or not there, checked by digest, collected by age."""

import hashlib
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from offsite.coordinator.store import blobs as blobs_module
from offsite.coordinator.store import bucket
from offsite.coordinator.store.blobs import Folder
from offsite.coordinator.store.bucket import Bucket
from offsite.protos.chunks import digest_bytes
from offsite.protos.errors import InputError, MismatchError, NotFoundError

from .conftest import DAY_S, Kept


def test_a_blob_is_there_whole_or_not_at_all(kept: Kept) -> None:
    kept.blobs.check()
    for content in (b"one", b"one", b"two"):
        digest = kept.take(content)
        assert digest == digest_bytes(content) and not (kept.folder / "file").exists()
        assert kept.blobs.path(digest).read_bytes() == kept.blobs.served(digest).read_bytes() == content
        assert kept.file(digest).read_bytes() == content and kept.blobs.size(digest) == 3
    with pytest.raises(MismatchError, match="announced was"):
        kept.take(b"three", digest=digest_bytes(b"one"))
    assert digest_bytes(b"three") not in kept.blobs and (kept.folder / "file").exists()


def test_digests_of_an_older_journal_are_read_and_collected_like_new_ones(kept: Kept) -> None:
    old = "sha256:" + hashlib.sha256(b"old").hexdigest()
    new = kept.take(b"new")
    assert new.startswith("blake3:") and kept.take(b"old", digest=old) == old
    assert kept.blobs.path(old).read_bytes() == b"old" and kept.blobs.path(new).read_bytes() == b"new"
    kept.age(old, new)
    assert kept.blobs.sweep({old}, before=time.time() + DAY_S) == (1, 3)
    assert old in kept.blobs and new not in kept.blobs


def test_a_folder_of_an_older_journal_is_read_where_it_lies(tmp_path: Path) -> None:
    place = tmp_path / "blobs" / hashlib.sha256(b"old").hexdigest()[:2] / hashlib.sha256(b"old").hexdigest()[2:]
    place.parent.mkdir(parents=True)
    place.write_bytes(b"old")
    assert Folder(tmp_path / "blobs").path("sha256:" + hashlib.sha256(b"old").hexdigest()) == place


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="another disk is at hand on Linux")
def test_a_file_of_another_disk_is_moved_in_as_well(tmp_path: Path) -> None:
    with TemporaryDirectory(dir="/dev/shm") as disk:
        file = Path(disk) / "file"
        file.write_bytes(b"from afar")
        assert file.stat().st_dev != tmp_path.stat().st_dev
        blobs = Folder(tmp_path / "blobs")
        digest, _ = blobs.take(file)
        assert blobs.path(digest).read_bytes() == b"from afar" and not file.exists()
        assert list(blobs.path(digest).parent.iterdir()) == [blobs.path(digest)]


def test_only_a_digest_names_a_blob(kept: Kept) -> None:
    for name in ("../journal.db", "blake3:" + "A" * 64, ""):
        with pytest.raises(InputError, match="is not a digest"):
            kept.blobs.path(name)
    with pytest.raises(NotFoundError, match="put it back from a backup, or submit the run again"):
        kept.blobs.path(digest_bytes(b"never seen"))


def test_a_bit_that_rots_is_noticed_by_whoever_reads_and_mended_by_whoever_brings_it_again(kept: Kept) -> None:
    digest = kept.take(b"one")
    kept.blobs.served(digest)
    kept.forget()
    kept.file(digest).write_bytes(b"onf")
    for read in (kept.blobs.path, kept.blobs.served):
        with pytest.raises(MismatchError, match=f"{digest[9:]}.* has changed since it was stored"):
            read(digest)
    assert kept.take(b"one") == digest and kept.blobs.path(digest).read_bytes() == b"one"


def test_what_is_not_kept_and_old_is_collected(kept: Kept) -> None:
    old, kept_old, again, young = (kept.take(content) for content in (b"old", b"kept", b"again", b"young"))
    kept.age(old, kept_old, again)
    kept.take(b"again")  # a step has just stored it once more
    before = time.time() - DAY_S
    assert kept.blobs.sweep({kept_old}, before=before, dry_run=True) == (1, 3) and old in kept.blobs
    assert kept.blobs.sweep({kept_old}, before=before) == (1, 3)
    assert old not in kept.blobs and all(digest in kept.blobs for digest in (kept_old, again, young))
    assert kept.blobs.sweep({kept_old}, before=before) == (0, 0)


def test_what_is_shared_stays_where_it_is_and_is_young(kept: Kept) -> None:
    (kept.folder / "owned").write_bytes(b"owned")
    digest, size = kept.blobs.share(kept.folder / "owned")
    assert (digest, size) == (digest_bytes(b"owned"), 5) and (kept.folder / "owned").exists()
    kept.age(digest)
    assert kept.blobs.share(kept.folder / "owned") == (digest, size)
    assert kept.blobs.sweep(set(), before=time.time() - DAY_S) == (0, 0)
    kept.forget()
    assert kept.blobs.path(digest).read_bytes() == b"owned"


def test_a_young_file_is_not_put_again(stored: Kept) -> None:
    (stored.folder / "owned").write_bytes(b"owned")
    digest, _ = stored.blobs.share(stored.folder / "owned")
    stored.age(digest, days=0.4)
    before = stored.file(digest).stat()
    stored.blobs.share(stored.folder / "owned")
    assert stored.file(digest).stat().st_mtime == before.st_mtime


def test_a_file_that_changes_while_it_is_shared_is_not_taken(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept.folder / "owned").write_bytes(b"after")
    monkeypatch.setattr(bucket, "digest_file", lambda _: digest_bytes(b"before"))
    monkeypatch.setattr(blobs_module, "digest_file", lambda _, like="": digest_bytes(b"after" if like else b"before"))
    with pytest.raises(MismatchError):
        kept.blobs.share(kept.folder / "owned")
    assert digest_bytes(b"before") not in kept.blobs


def test_what_is_stored_again_while_it_is_collected_stays(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, hold = kept.take(b"one"), "_remove" if isinstance(kept.blobs, Bucket) else "_locked"
    kept.age(digest)
    whole = getattr(type(kept.blobs), hold)

    def late(*arguments: Any) -> Any:  # the list was read, and the object was old
        monkeypatch.undo()
        kept.take(b"one")
        return whole(*arguments)

    monkeypatch.setattr(type(kept.blobs), hold, late)
    assert kept.blobs.sweep(set(), before=time.time() - DAY_S) == (0, 0)
    kept.forget()
    assert kept.blobs.path(digest).read_bytes() == b"one"
