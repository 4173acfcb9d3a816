"""Blobs in a bucket: what other machines do to it meanwhile, what is near, and a server that goes away."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from offsite.coordinator.store import Unusable, bucket, removals
from offsite.coordinator.store import blobs as blobs_module
from offsite.coordinator.store.blobs import room
from offsite.coordinator.store.bucket import Bucket
from offsite.coordinator.store.opening import open_blobs
from offsite.protos.chunks import digest_bytes
from offsite.protos.errors import MismatchError, ResourceError

from .conftest import DAY_S, Kept, in_bucket


@pytest.mark.parametrize("late", ["while it is removed", "once it has been"])
def test_what_another_machine_stores_just_as_it_is_collected_is_there_in_the_end(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    url, remove, put = s3.url(), bucket.obstore.delete, bucket.obstore.put
    one, other = (
        Kept(open_blobs(url, cache=tmp_path / name), tmp_path, lambda one: s3.object(url, one), s3) for name in "ab"
    )
    digest = one.take(b"one")
    writer = threading.Thread(target=other.take, args=(b"one",))
    stored, removed = threading.Event(), threading.Event()
    one.age(digest)

    def put_then(store: Any, name: str, *arguments: Any, **more: Any) -> None:
        put(store, name, *arguments, **more)
        if digest[7:] in name:
            stored.set()
            assert late != "once it has been" or removed.wait(60)

    def remove_then(store: Any, name: str) -> None:
        if digest[7:] in name:  # it was old when it was looked at last
            writer.start()
            assert stored.wait(60)
        remove(store, name)
        if digest[7:] not in name:  # the list of what was to be removed
            removed.set()

    monkeypatch.setattr(bucket.obstore, "put", put_then)
    monkeypatch.setattr(bucket.obstore, "delete", remove_then)
    assert one.blobs.sweep(set(), before=time.time() - DAY_S) == (1, 3)
    writer.join()
    assert digest in one.blobs and digest in other.blobs


def test_a_collection_that_was_killed_holds_nobody_up(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.url()
    stored = Kept(open_blobs(url, cache=tmp_path / "cache"), tmp_path, lambda digest: s3.object(url, digest), s3)
    assert isinstance(stored.blobs, Bucket)
    digest, place = digest_bytes(b"one"), stored.file("removals:left")
    with stored.blobs._removals.announced([digest]):
        (announced,) = place.parent.iterdir()
        assert announced.read_text() == digest
        announced.rename(place)
    monkeypatch.setattr(removals, "GONE_S", 0.3)
    s3.look()
    assert stored.take(b"one") == digest, "after a while"
    os.utime(place, (time.time() - 2 * removals.STALE_S,) * 2)
    s3.look()
    monkeypatch.setattr(removals, "GONE_S", 600.0)
    assert stored.take(b"one") == digest, "at once"
    stored.blobs.sweep({digest}, before=time.time())
    assert not place.exists() and digest in stored.blobs


def test_what_is_read_is_here_and_is_fetched_when_it_is_not_or_has_rotted(
    stored: Kept, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = stored.take(b"one")
    monkeypatch.setattr(bucket, "client", None)  # neither needs the bucket
    assert stored.blobs.path(digest) == stored.blobs.served(digest)
    monkeypatch.undo()
    for lose in (lambda: stored.blobs.path(digest).write_bytes(b"onf"), stored.forget):
        for read in (stored.blobs.path, stored.blobs.served):
            lose()
            assert read(digest).read_bytes() == b"one"
    stored.blobs.path(digest).write_bytes(b"onf")
    path, judge = stored.blobs.passed(digest)
    assert judge is not None
    with pytest.raises(MismatchError, match="had changed since it was stored; it is fetched again"):
        judge(digest_bytes(path.read_bytes()))
    assert stored.blobs.passed(digest)[0].read_bytes() == b"one"


def test_what_was_stamped_is_checked_again_once_its_file_or_its_time_has_changed(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(path: Path, **like: Any) -> str:
        checked.append(path)
        return digest_file(path, **like)

    digest_file, checked, digest = blobs_module.digest_file, list[Path](), kept.take(b"one")
    monkeypatch.setattr(blobs_module, "digest_file", noted)
    stamp = kept.blobs.stamp(digest)
    assert len(checked) == 1 and kept.blobs.path(digest, stamp) == checked[0] and len(checked) == 1
    for seconds, times in ((-blobs_module.FRESH_S - 1, 2), (60, 3)):  # too long ago; or by a clock that is wrong
        kept.blobs.path(digest, replace(stamp, at=stamp.at + seconds))
        assert len(checked) == times
    about = checked[0].stat()
    os.utime(checked[0], ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    kept.blobs.path(digest, stamp)
    assert len(checked) == 4
    stamp = kept.blobs.stamp(digest)
    checked[0].write_bytes(b"onf")
    if isinstance(kept.blobs, Bucket):
        assert kept.blobs.path(digest, stamp).read_bytes() == b"one", "it is fetched again"
        return
    for read in (lambda: kept.blobs.path(digest, stamp), lambda: kept.blobs.stamp(digest)):
        with pytest.raises(MismatchError, match="has changed since it was stored"):
            read()


def test_what_is_here_stays_within_its_bound_and_what_was_used_just_now_stays(s3: Any, tmp_path: Path) -> None:
    stored = in_bucket(s3, tmp_path, cache="2M")
    digests = [stored.take(bytes([number]) * 690_000) for number in range(3)]
    here = {digest: stored.blobs.path(digest) for digest in digests}
    assert all(path.exists() for path in here.values()), "all were used within the hour"
    for digest, hours in zip(digests, (2, 3, 0.5), strict=True):
        os.utime(here[digest], (time.time() - hours * 3600, here[digest].stat().st_mtime))
    new = stored.take(b"\x09" * 690_000)
    assert [path.exists() for path in here.values()] == [True, False, True], "the longest unused one went"
    stored.blobs.served(digests[0])
    os.utime(here[digests[2]], (time.time() - 7200, here[digests[2]].stat().st_mtime))
    assert stored.blobs.path(digests[1]).read_bytes() == b"\x01" * 690_000
    assert [path.exists() for path in here.values()] == [True, True, False] and stored.blobs.path(new).exists()


@pytest.mark.parametrize("what", ["keep", "fetch"])
def test_a_server_that_is_killed_in_the_middle_leaves_nothing_half_and_goes_on(
    stored: Kept, s3: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(1 << 20) * 16
    digest, file = digest_bytes(content), stored.folder / "file"
    monkeypatch.setattr(bucket, "PATIENT_S", 1.0)
    if what == "fetch":
        stored.take(content)
        stored.forget()
    else:
        file.write_bytes(content)

    def work() -> None:
        with suppress(Unusable):
            stored.blobs.keep(file, digest) if what == "keep" else stored.blobs.path(digest)

    def moved() -> int:
        counters = psutil.Process(s3.process.pid).io_counters()
        return int(counters.read_chars if what == "keep" else counters.write_chars)

    thread, start = threading.Thread(target=work), moved()
    thread.start()
    while moved() - start < 4 << 20:
        time.sleep(0.002)
    psutil.Process(s3.process.pid).suspend()
    assert thread.is_alive(), "it is in the middle"
    s3.kill()
    try:
        assert what == "fetch" or not stored.file(digest).exists()
        assert not stored.blobs._cache._place(digest).exists()  # type: ignore[attr-defined]
    finally:
        s3.start()
    thread.join()
    if what == "keep" and file.exists():
        stored.blobs.keep(file, digest)
    assert stored.file(digest).read_bytes() == stored.blobs.path(digest).read_bytes() == content


def test_what_hinders_a_bucket_is_a_sentence_without_its_key(s3: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for module in (bucket, removals):
        monkeypatch.setattr(module, "PATIENT_S", 0.1)
        monkeypatch.setattr(module, "HURRIED_S", 0.1)

    def hindrance(url: str) -> str:
        blobs = open_blobs(url, cache=tmp_path / "cache")
        (tmp_path / "file").write_bytes(b"one")
        said = set()
        for call in (blobs.check, lambda: blobs.take(tmp_path / "file"), lambda: blobs.sweep(set(), before=0)):
            with pytest.raises(Unusable) as caught:
                call()
            said.add(str(caught.value))
        assert len(said) == 1 and (tmp_path / "file").exists()
        return said.pop()

    sentence = hindrance(f"s3://other/runs?endpoint={s3.endpoint}")
    assert sentence == "s3://other/runs: there is no such bucket; make it, or name another"
    away = hindrance("s3://bucket?endpoint=http://127.0.0.1:1")
    assert away.startswith("s3://bucket: http://127.0.0.1:1 does not answer as it should")
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    assert "plain http is for this machine" in hindrance("s3://bucket?endpoint=http://127.0.0.2:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    assert "http://127.0.0.2:2 does not answer" in hindrance("s3://bucket?endpoint=http://127.0.0.2:2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistaken")
    assert "does not accept the key; look at AWS_ACCESS_KEY_ID" in hindrance(s3.url())
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "there is no key for it; set AWS_ACCESS_KEY_ID" in hindrance(s3.url())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "there is no key for it; set AWS_ACCESS_KEY_ID" in hindrance(s3.url())


MEMORY = """
import re, sys
from pathlib import Path
from offsite.coordinator.store.opening import open_blobs

url, folder = sys.argv[1], Path(sys.argv[2])
blobs = open_blobs(url, cache=folder / "cache")
for size in (1 << 20, 96 << 20):
    with (folder / "file").open("wb") as file:
        file.truncate(size)
    digest, _ = blobs.take(folder / "file")
    (folder / "cache" / "blake3" / digest[7:9] / digest[9:]).unlink()
    blobs.path(digest)
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())  # getrusage tells the parent's, too
    print(int(peak[1]) >> 10)
"""


@pytest.mark.slow(alone=True)
def test_a_large_blob_is_put_and_fetched_in_pieces(s3: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, s3.url(), str(tmp_path)]
    small, large = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert large - small < 64, "MiB of 96"


def test_a_full_disk_is_said_to_be_full_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100 << 20, 35 << 20, 65 << 20))
    assert blobs_module.shutil is shutil
    room(tmp_path, 1 << 19)
    with pytest.raises(ResourceError, match="65 MiB free, 74 MiB are needed") as caught:
        room(tmp_path, 10 << 20)
    assert caught.value.exit_code == 8
