"""A backup is whole or not there, is of one moment, and becomes a coordinator with whichever stores."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from offsite.coordinator.backup import taking
from offsite.coordinator.backup.inventory import LOST
from offsite.coordinator.backup.restoring import Backup
from offsite.coordinator.backup.taking import take
from offsite.coordinator.home import Home
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.retention import Retention, collect
from offsite.coordinator.store.blobs import Folder, Stored
from offsite.coordinator.store.copies import GAP
from offsite.coordinator.store.journal import Journal, Key
from offsite.coordinator.store.tables import metadata
from offsite.protos.errors import ConflictError, InputError, MismatchError, NotFoundError, ResourceError
from offsite.protos.events import Completed, RoundDone, SiteState, StepBegun, Warned
from offsite.protos.security.pki import Authority

Rows = dict[str, list[dict[str, Any]]]
FAR = pytest.mark.parametrize(
    ("source", "target"), [("near", "near"), ("near", "far"), ("far", "near"), ("far", "far")]
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Authority.create(tmp_path_factory.mktemp("pki") / "pki").issue("coordinator", "coordinator")


@pytest.fixture
def home(tmp_path: Path, kit: Path) -> Home:
    made = Home(tmp_path / "home", kit).prepare()
    made.use()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "backup"


@pytest.fixture
def urls(request: pytest.FixtureRequest) -> Callable[[str], dict[str, str]]:
    """Stores of a kind: near (SQLite and a folder) or far (PostgreSQL and S3)."""

    def made(kind: str) -> dict[str, str]:
        if kind == "near":
            return {}
        return {"journal": request.getfixturevalue("postgresql").empty(), "blobs": request.getfixturevalue("s3").url()}

    return made


def store(home: Home, content: str) -> str:
    file = home.node.scratch / "file"
    file.write_text(content)
    return home.blobs().take(file)[0]


def begin(home: Home, run: str, *, over: bool = False) -> dict[str, str]:
    """A run with one of all that runs have, one site done with its task and one at it; returns its files."""
    layer = store(home, f"layer {run}")
    files = {"layer": layer, "manifest": store(home, json.dumps({"files": [{"digest": layer}], "of": run}))}
    files |= {kind: store(home, f"{kind} {run}") for kind in ("start", "update")}
    with closing(home.journal()) as journal:
        journal.add_run(run, token=run, owner="alice", spec=b"{}")
        built = {"manifest": files["manifest"], "version": {"adapter": files["start"], "figures": {"loss": 0.1}}}
        hashes = {"base": {"digest": "sha256:" + 64 * "0"}, "method_hash": "blake3:" + 64 * "0"}
        journal.add_step(run, "version:0", built | hashes, StepBegun(step="build"))
        for site in ("ward", "lab"):
            key = Key(run, 0, site, 0)
            journal.add_task(key, spec=b"{}", signature=b"\0\xff")
            journal.set_task(key, SiteState(round=1, site=site, state="taken"), state="training", step=2, loss=1 / 3)
        journal.set_task(Key(run, 0, "ward", 0), state="uploaded", update=files["update"], metrics="{}")
        journal.enrol("ward", examples=2**53, version="1", policy="x")
        if over:
            files["published"] = store(home, f"published {run}")
            published = {"adapter": Stored(digest=files["published"], size=1)}
            journal.end_run(run, Completed(), report='{"a": "\\u0001"}', published=published)
    return files


def rows(home: Home) -> Rows:
    with closing(home.journal()) as journal, journal._read() as connection:
        tables = metadata.sorted_tables
        found = {table.name: connection.execute(sa.select(table).order_by(*table.primary_key)) for table in tables}
        return {name: [dict(row) for row in result.mappings()] for name, result in found.items()}


@pytest.mark.slow(alone=True)
@FAR
def test_a_home_with_any_stores_becomes_one_with_any_stores(
    source: str, target: str, kit: Path, folder: Path, urls: Any, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home", kit).prepare()
    home.use(**urls(source))
    files = {*begin(home, "live").values(), *begin(home, "over", over=True).values()}
    policy = OwnerPolicy(max_live_runs=7)
    home.keep(policy)
    home.crl_seen.write_text("1790000000")
    before = rows(home)
    inventory, new = take(home, folder)
    assert (inventory.live, inventory.rows["runs"], inventory.lost) == (1, 2, ())
    assert (inventory.files, new.files, new.bytes) == (9, 9, inventory.bytes)
    assert rows(home) == before, "the home is as it was"
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"PRIVATE" in text or b"confidential" in text for text in texts)

    shutil.rmtree(home.root)
    backup, other = Backup(folder, kit), Home(tmp_path / "other", kit)
    backup.check()
    backup.restore(other, **urls(target))
    assert all(other.blobs().path(digest).is_file() for digest in files)
    assert other.policy() == policy and other.crl_seen.read_text() == "1790000000"
    after = rows(other)
    news = after["events"].pop()
    assert news["run"] == "live" and news["data"]["message"].startswith("restored from a backup of 20")
    assert {**after, "events": 0} == {**before, "events": 0}
    assert [{**event, "at": 0} for event in after["events"]] == [{**event, "at": 0} for event in before["events"]]
    with closing(other.journal()) as journal:
        journal.add_event("live", RoundDone(round=1, sites=1, figures={}))
        numbers = [event.seq for event in journal.events("live")][-2:]
    assert numbers == [news["seq"], news["seq"] + 1], "whichever database numbered what was there"
    assert news["seq"] >= GAP, "a number that somebody saw since the backup is not given again"


def test_the_time_in_which_there_was_no_coordinator_counts_against_no_site(home: Home) -> None:
    begin(home, "live")
    begin(home, "over", over=True)
    before = rows(home)["events"]
    with closing(home.journal()) as journal:
        assert journal.wake(Warned(message="back"), away_s=1e6) == 1
    later = {(was["run"], was["site"]) for was, now in zip(before, rows(home)["events"], strict=False) if was != now}
    assert later == {("live", "lab")}, "the one that is at its task"


def test_another_backup_into_the_folder_copies_what_is_new_and_lets_go_of_the_rest(home: Home, folder: Path) -> None:
    begin(home, "first", over=True)
    take(home, folder)
    assert take(home, folder)[1] == taking.New()
    begin(home, "second", over=True)
    inventory, new = take(home, folder)
    assert (inventory.files, new.files) == (10, 5)
    collect(home, Retention(keep_runs=1, working_days=0))
    assert take(home, folder)[0].files == 1
    assert len([path for path in (folder / "files").rglob("??/*")]) == 1 + 1, "and the journal"


def test_one_that_is_cut_short_is_none_and_leaves_the_earlier_one_as_it_was(
    home: Home, folder: Path, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    whole, left = Folder.take, [2]

    def short(self: Folder, file: Path, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return whole(self, file, **options)

    def cut(blobs: int) -> None:
        left[0] = blobs
        with monkeypatch.context() as dying, pytest.raises(Killed):
            dying.setattr(Folder, "take", short)
            take(home, folder)

    begin(home, "first")
    cut(2)
    with pytest.raises(NotFoundError, match=r"no backup: backup.json is written last"):
        Backup(folder, kit)
    assert take(home, folder)[1].files == 4 - 2, "what was copied is not copied again"
    begin(home, "second")
    cut(3)
    Backup(folder, kit).check()
    Backup(folder, kit).restore(other := Home(tmp_path / "other", kit))
    assert [run["id"] for run in rows(other)["runs"]] == ["first"]


def test_a_restore_that_is_cut_short_is_done_again(
    home: Home, folder: Path, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    begin(home, "run")
    take(home, folder)
    other = Home(tmp_path / "other", kit)
    for owner, method in ((Folder, "keep"), (Home, "keep"), (Journal, "wake"), (Journal, "fill")):
        with monkeypatch.context() as dying, pytest.raises(Killed):
            dying.setattr(owner, method, die)
            Backup(folder, kit).restore(other)
        assert rows(other)["runs"] == []
    Backup(folder, kit).restore(other)
    assert [run["id"] for run in rows(other)["runs"]] == ["run"]


@pytest.mark.slow(alone=True)
def test_what_is_damaged_is_refused_and_named(home: Home, folder: Path, kit: Path, tmp_path: Path) -> None:
    begin(home, "live")
    begin(home, "over", over=True)
    take(home, folder)
    kept = shutil.copytree(folder, tmp_path / "kept")
    files = [path for path in folder.rglob("??/*") if path.is_file()]
    assert len(files) == 10
    for number, file in enumerate(files):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.unlink()  # it may be a link
        with pytest.raises(MismatchError, match="the backup is damaged"):
            Backup(folder, kit).check()
        file.write_bytes(data)
        with pytest.raises(MismatchError, match="changed"):
            Backup(folder, kit).restore(other := Home(tmp_path / f"other-{number}", kit))
        assert rows(other)["runs"] == []
        shutil.copy(kept / file.relative_to(folder), file)
    Backup(folder, kit).check()


def test_an_inventory_of_another_owner_or_format_or_that_was_changed_is_refused(
    home: Home, folder: Path, kit: Path, tmp_path: Path
) -> None:
    begin(home, "run")
    take(home, folder)
    stranger = Authority.create(tmp_path / "pki").issue("coordinator", "coordinator")
    with pytest.raises(MismatchError, match="with the key that it was taken with"):
        Backup(folder, stranger)
    file = folder / "backup.json"
    sealed = json.loads(file.read_text())
    for change, error, words in (
        ({"crl_number": 5}, MismatchError, "changed, or not signed"),
        ({"format": 2, "version": "9.1"}, InputError, "format 2 is newer than 1.* install offsite 9.1"),
        ({"format": "x"}, InputError, "not an inventory"),
    ):
        file.write_text(json.dumps(sealed | {"inventory": sealed["inventory"] | change}))
        with pytest.raises(error, match=words):
            Backup(folder, kit)
    for garbage in ("", "[]", "{}", '{"inventory": {}, "signature": "zz"}'):
        file.write_text(garbage)
        with pytest.raises(InputError, match="not an inventory"):
            Backup(folder, kit)


def test_a_journal_of_a_newer_version_is_not_halved(home: Home, folder: Path, kit: Path, tmp_path: Path) -> None:
    begin(home, "run")
    added = metadata.tables["runs"]
    column: Any = sa.Column("newest", sa.String)
    added.append_column(column)
    try:
        with closing(home.journal()):
            take(home, folder)
    finally:
        added._columns.remove(column)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="its journal has runs.newest, which this version does not know"):
        Backup(folder, kit).restore(Home(tmp_path / "other", kit))


def test_nothing_that_is_in_use_is_written_over(
    home: Home, folder: Path, kit: Path, tmp_path: Path, postgresql: Any
) -> None:
    begin(home, "run")
    take(home, folder)
    with pytest.raises(ConflictError, match="home: its journal is in use already"):
        Backup(folder, kit).restore(home)
    url = postgresql.empty()
    Backup(folder, kit).restore(Home(tmp_path / "one", kit), journal=url)
    with pytest.raises(ConflictError, match="into an empty database or schema"):
        Backup(folder, kit).restore(two := Home(tmp_path / "two", kit), journal=url)
    assert not two.begun
    three = Home(tmp_path / "three", kit).prepare()
    with closing(three.journal()) as journal, closing(journal.hold()) as hold:
        assert hold.take()
        with pytest.raises(ResourceError, match="three: a coordinator is up on its journal"):
            Backup(folder, kit).restore(three)
    with closing(three.journal()) as journal:
        journal.announce("gateway", policy="", owner="", address="")
        with pytest.raises(ResourceError, match="three: a coordinator is up on its journal"):
            Backup(folder, kit).restore(three)

    with pytest.raises(ConflictError, match="home: not a backup: it has "):
        take(home, home.root)
    with taking._alone(folder), pytest.raises(ResourceError, match="another backup is being taken"):
        take(home, folder)


def test_what_is_collected_meanwhile_is_not_lost_and_what_is_lost_is_said(
    home: Home, folder: Path, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offsite: Any
) -> None:
    files = begin(home, "live")
    whole = taking._add

    def slow(*arguments: Any) -> None:
        monkeypatch.setattr(taking, "_add", whole)
        with closing(home.journal()) as journal:
            journal.end_run("live", Completed())
        collect(home, Retention(working_days=0))
        whole(*arguments)

    monkeypatch.setattr(taking, "_add", slow)
    inventory, _ = take(home, folder)
    assert (inventory.live, inventory.files, inventory.lost) == (0, 0, ())

    files = begin(home, "again")
    home.blobs().path(files["update"]).write_text("rotten")
    command = ("coordinator", "backup", str(folder), "--home", str(home.root), "--identity", str(kit))
    said = offsite(*command)
    assert said.returncode == 7 and files["update"] in said.stderr and "1 files itself" in said.stderr
    backup = Backup(folder, kit)
    assert backup.inventory.lost == (files["update"],)
    backup.restore(other := Home(tmp_path / "other", kit))
    assert other.blobs().path(files["start"]).is_file() and files["update"] not in other.blobs()
    assert LOST > 1


def test_a_full_disk_is_said_to_be_full(
    home: Home, folder: Path, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(home, "run")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda folder: usage(100 << 20, 100 << 20, 0))
        full.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(18, "another disk")))
        with pytest.raises(ResourceError, match="backup/files: the disk has 0 MiB free"):
            take(home, folder)
    take(home, folder)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda folder: usage(100 << 20, 100 << 20, 0))
        with pytest.raises(ResourceError, match="the disk has 0 MiB free"):
            Backup(folder, kit).restore(Home(tmp_path / "other", kit))
    Backup(folder, kit).restore(Home(tmp_path / "other", kit))


def test_the_commands_say_what_they_did(home: Home, folder: Path, kit: Path, tmp_path: Path, offsite: Any) -> None:
    begin(home, "run")
    whose = ("--identity", str(kit), "--home")
    said = offsite("coordinator", "backup", str(folder), *whose, str(home.root))
    assert said.returncode == 0 and "1 runs (1 not over), 3 events, 4 files, 0.0 MB, as of 20" in said.stdout
    again = json.loads(offsite("coordinator", "backup", str(folder), *whose, str(home.root), "--format", "json").stdout)
    assert (again["files"], again["new"]) == (4, {"files": 0, "bytes": 0})
    other = str(tmp_path / "other")
    said = offsite("coordinator", "restore", str(folder), *whose, other, "--dry-run")
    assert said.returncode == 0 and "is whole: 1 runs" in said.stdout and not Path(other).exists()
    said = offsite("coordinator", "restore", str(folder), *whose, other)
    assert said.returncode == 0 and f"offsite coordinator up --home {other}" in said.stdout
    said = offsite("coordinator", "restore", str(folder), *whose, other)
    assert said.returncode == 11 and said.stderr.count("\n") == 1
    said = offsite("coordinator", "backup", str(folder), *whose, str(tmp_path / "none"))
    assert said.returncode == 6 and not (tmp_path / "none").exists()
