"""Which version a run's start stands for, and what a run must have in common with it."""

from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.runs.continuing import Left, ancestor, judge
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.results import Folded
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.journal import Journal
from offsite.protos.documents import to_json, to_plain
from offsite.protos.errors import InputError, NotFoundError
from offsite.protos.events import Completed, Failed
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Ancestor, Choice, RunSpec

BOTH = frozenset({"r2", "r4"})


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", tmp_path / "kit").prepare()


def stored(home: Home, content: str) -> Stored:
    file = home.node.scratch / "file"
    file.write_text(content)
    digest, size = home.blobs().take(file)
    return Stored(digest=digest, size=size)


def make_run(home: Home, journal: Journal, name: str, *, rounds: int, kept: str = "", **spec: Any) -> None:
    """A run with so many rounds that are done."""
    grant = Grant(model="m", **spec)
    journal.add_run(name, token=name, owner="alice", spec=to_json(grant), granted=to_plain(grant))
    journal.add_step(name, "version:0", {})
    sent = {tier: stored(home, tier) for tier in BOTH}
    state = dict.fromkeys(["residual.r2", *([kept] if kept else [])], stored(home, "rest").digest)
    version = Version(adapter=sent["r4"].digest, broadcast=sent, state=state)
    for number in range(1, rounds + 1):
        journal.add_step(name, f"version:{number}", to_plain(Folded(version=version, lineage={})))


def test_a_start_is_the_last_round_of_a_completed_run_or_any_that_is_done(home: Home) -> None:
    journal = home.journal()
    make_run(home, journal, "old", rounds=2)
    with pytest.raises(InputError, match="run old is queued; name a round of it that is done, such as old:2"):
        ancestor(journal, "old")
    assert ancestor(journal, "old:1") == Ancestor(run="old", round=1, rounds=1)
    with pytest.raises(InputError, match="run old has no round 3; old:2 is the last that is done"):
        ancestor(journal, "old:3")
    journal.end_run("old", Completed(), report="{}", published={})
    assert ancestor(journal, "old") == ancestor(journal, "old:2") == Ancestor(run="old", round=2, rounds=2)
    make_run(home, journal, "new", rounds=3, continues=Ancestor(run="old", round=2, rounds=2))
    journal.end_run("new", Failed(error="far enough"))
    assert ancestor(journal, "new:3") == Ancestor(run="new", round=3, rounds=5), "with those of the run before it"
    make_run(home, journal, "none", rounds=0)
    with pytest.raises(InputError, match="run none is queued, and none of its rounds is done"):
        ancestor(journal, "none:1")
    with pytest.raises(NotFoundError, match="nowhere"):
        ancestor(journal, "nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, 'is of model "m", this run of "other"; a run goes on with the same'),
        ({"method": Choice(name="blocks")}, "is of method .*lora.*, this run of .*blocks"),
        ({"trainable": Choice(name="kept")}, "is of trainable .*ends.*, this run of .*kept"),
        ({"strategy": Choice(name="mean")}, r"strategy mean does not know \(residual.r2\); go on with low-rank"),
    ],
)
def test_a_run_goes_on_only_with_what_the_version_is_of(home: Home, changes: dict[str, Any], words: str) -> None:
    journal = home.journal()
    make_run(home, journal, "old", rounds=1)
    fields: dict[str, Any] = {"model": "m", "continues": ancestor(journal, "old:1")}
    judge(journal, home.blobs(), Grant(**fields), tiers=BOTH)
    judge(journal, home.blobs(), Grant(model="other"), tiers=BOTH)
    with pytest.raises(InputError, match=f"start: round 1 of run old {words}|keeps what {words}"):
        judge(journal, home.blobs(), Grant(**fields | changes), tiers=BOTH)


def test_a_memory_is_not_another_s_to_go_on_with_but_may_be_forgotten(home: Home) -> None:
    journal, blobs = home.journal(), home.blobs()
    make_run(home, journal, "old", rounds=1, memory=Choice(name="lae"), kept="memory.offline")
    fields: dict[str, Any] = {"model": "m", "continues": ancestor(journal, "old:1")}
    for other in ("lae", "lae(c=3.0)", "none"):
        judge(journal, blobs, Grant(**fields, memory=parse_one(other)), tiers=BOTH)
    words = r"keeps what memory ema does not know \(memory.offline\); go on with lae, or with none, which forgets it"
    with pytest.raises(InputError, match=f"start: round 1 of run old {words}"):
        judge(journal, blobs, Grant(**fields, memory=Choice(name="ema")), tiers=BOTH)
    with pytest.raises(InputError, match=r"strategy mean does not know \(residual.r2\); go on"):
        judge(journal, blobs, Grant(**fields, strategy=Choice(name="mean")), tiers=BOTH)


def test_a_memory_goes_on_after_runs_that_only_measured(home: Home) -> None:
    journal, blobs = home.journal(), home.blobs()
    make_run(home, journal, "old", rounds=1, memory=Choice(name="lae"), kept="memory.offline")
    for before, run in (("old", "sums"), ("sums", "more")):
        fisher: dict[str, Any] = {"method": Choice(name="fisher"), "continues": ancestor(journal, f"{before}:1")}
        make_run(home, journal, run, rounds=1, kept="memory.offline", **fisher)

    def leaves(spec: RunSpec) -> Left:
        measured = {"fisher"} if spec.method.name == "fisher" else set()
        return Left(Choice(name="lora"), frozenset(measured))

    start = ancestor(journal, "more:1")
    for name in ("lae", "none"):
        grant = Grant(model="m", continues=start, memory=Choice(name=name))
        judge(journal, blobs, grant, tiers=BOTH, leaves=leaves)
    with pytest.raises(InputError, match="keeps what memory ema does not know .* go on with lae, or with none"):
        judge(
            journal,
            blobs,
            Grant(model="m", continues=start, memory=Choice(name="ema")),
            tiers=BOTH,
            leaves=leaves,
        )


def test_a_tier_that_the_version_has_nothing_for_and_files_that_are_gone_are_named(home: Home) -> None:
    journal, blobs = home.journal(), home.blobs()
    make_run(home, journal, "old", rounds=1)
    grant = Grant(model="m", continues=ancestor(journal, "old:1"))
    with pytest.raises(InputError, match="has nothing for sites of tier r8, only of r2, r4"):
        judge(journal, blobs, grant, tiers=frozenset({"r2", "r8"}))
    blobs.path(stored(home, "rest").digest).unlink()
    with pytest.raises(InputError, match="is gone: what a run worked with is kept for some days only"):
        judge(journal, blobs, grant, tiers=BOTH)
