"""A home remembers its stores for every process that opens it, takes no others, and tells nobody a password."""

from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.store import Unusable
from offsite.coordinator.store.opening import open_blobs, open_journal, place, shown
from offsite.protos.errors import ConflictError, InputError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", tmp_path / "kit").prepare()


def test_a_home_has_its_stores_in_it_and_keeps_them_when_it_is_moved(home: Home, tmp_path: Path) -> None:
    assert not home.begun
    home.use()
    home.journal().add_run("r", token="t", owner="alice", spec=b"{}")
    assert home.begun and (home.root / "journal.db").is_file() and (home.root / "blobs").is_dir()
    moved = Home(home.root.rename(tmp_path / "moved on, 100 % & all?"), home.identity)
    moved.use()
    assert [run.id for run in moved.journal().runs()] == ["r"]


def test_every_process_opens_the_stores_that_a_home_began_with(home: Home, tmp_path: Path) -> None:
    urls = {"journal": f"sqlite:///{tmp_path}/elsewhere.db", "blobs": f"file://{tmp_path}/files"}
    home.use(**urls)
    home.journal().add_run("r", token="t", owner="alice", spec=b"{}")
    again = Home(home.root, home.identity)
    again.use()
    again.use(**urls)
    assert [run.id for run in again.journal().runs()] == ["r"] and again.blobs().root == tmp_path / "files"
    assert (home.root / "stores.json").stat().st_mode & 0o777 == 0o600
    assert not (home.root / "journal.db").exists()


@pytest.mark.parametrize("older", [False, True])
def test_a_home_takes_no_other_stores_than_it_began_with(home: Home, tmp_path: Path, older: bool) -> None:
    home.use()
    if older:  # one that knew of no others
        (home.root / "stores.json").unlink()
    with pytest.raises(
        ConflictError, match=r"began with its journal at sqlite:.*/home/journal.db, not at sqlite:.*new"
    ):
        home.use(journal=f"sqlite:///{tmp_path}/new.db")
    with pytest.raises(ConflictError, match=r"began with its blobs at .*leave out --blobs"):
        home.use(blobs=f"file://{tmp_path}/new")
    assert not (tmp_path / "new.db").exists() and not (tmp_path / "new").exists()


def test_a_home_does_not_begin_with_a_store_that_cannot_be_opened(home: Home, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scheme that is not known"):
        home.use(journal=f"sqlite:///{tmp_path}/journal.db", blobs="gopher://user:secret@host/blobs")
    assert not home.begun


def test_a_home_begins_with_a_bucket_that_is_there_and_may_name_its_settings_anew(
    home: Home, s3: Any, tmp_path: Path
) -> None:
    for url in (s3.url().replace("bucket", "other"), "s3://bucket?endpoint=http://127.0.0.1:1"):
        with pytest.raises(Unusable, match="no such bucket|127.0.0.1:1 does not answer"):
            home.use(blobs=url)
        assert not home.begun
    url = s3.url()
    home.use(blobs=url)
    (tmp_path / "file").write_bytes(b"one")
    digest, _ = home.blobs().take(tmp_path / "file")
    home.use(blobs=f"{url}&cache=1M")
    assert Home(home.root, home.identity).blobs().path(digest).read_bytes() == s3.object(url, digest).read_bytes()
    with pytest.raises(ConflictError, match=r"began with its blobs at s3://bucket/\d+, not at s3://bucket/\d+, where"):
        home.use(blobs=s3.url())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/srv/journal.db", r"--journal: not a URL; expected one such as sqlite:"),
        ("mysql://me:secret@host/name?password=secret", r"mysql://host/name has a scheme that is not known; expected"),
        ("sqlite://", "is not a URL of at most"),
        ("sqlite:////srv/\x00", "is not a URL of at most"),
        ("mysql://me:sec/r?et@secret@host/name", r"mysql://host/name has a scheme"),
    ],
)
def test_a_url_of_no_store_is_refused_in_a_sentence_without_its_password(url: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as refused:
        open_journal(url)
    assert "sec" not in str(refused.value)
    with pytest.raises(InputError, match="--blobs"):
        open_blobs(url, cache=tmp_path)


def test_a_store_is_the_same_under_a_new_password() -> None:
    assert place("postgresql://me:old@host/a?sslmode=require") == place("postgresql://you:new@host/a?sslmode=require")
    assert place("postgresql://host/a") != place("postgresql://host/b") != place("postgresql://host:1/b")
    assert shown("postgresql://me:old@host/a?sslmode=require") == "postgresql://host/a"
