"""Versions as people see them, and what is left of them after a roll-back."""

from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.runs.continuing import ancestor
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.lineage import later, lineage, newest, roll_back
from offsite.coordinator.runs.steps.results import Evaluation, Folded, Part
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.journal import Journal
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import to_json, to_plain
from offsite.protos.errors import ConflictError, InputError, NotFoundError
from offsite.protos.events import Completed, Event, RoundDone
from offsite.protos.figures import Score
from offsite.protos.spec import Ancestor


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Home(tmp_path / "home", tmp_path / "kit").prepare().journal()


def run(
    journal: Journal, name: str, *, start: str = "", live: bool = False, rounds: int = 2, owner: str = "olga"
) -> None:
    """A run of two rounds, of a task of its own name, that goes on from another one's version."""
    its, _, number = start.partition(":")
    continues = Ancestor(run=its, round=int(number), rounds=int(number)) if start else None
    grant = Grant(model="m", rounds=rounds, task=f"task-{name}", continues=continues)
    journal.add_run(name, token=name, owner=owner, spec=to_json(grant), granted=to_plain(grant))
    journal.add_step(name, "version:0", {})
    for at in range(1, rounds + 1):
        digest = digest_bytes(f"{name} {at}".encode())
        version = Version(adapter=digest, broadcast={"": Stored(digest=digest, size=1)}, state={"memory.lae": digest})
        folded = Folded(version=version, lineage={"bank": Part(update=digest, weight=1.0)})
        done: Event = RoundDone(round=at, sites=1, figures={})
        journal.add_step(name, f"version:{at}", to_plain(folded), done)
    journal.add_step(name, "plug_in", to_plain(Evaluation(sets={"exam": Score(nll=0.0, tokens=5)})))
    if not live:
        journal.end_run(name, Completed())


def test_a_lineage_is_what_led_to_a_run_and_the_run(journal: Journal) -> None:
    run(journal, "a")
    run(journal, "b", start="a:1")
    run(journal, "c", start="b:2")
    entries = lineage(journal, "c")
    assert [(one.run, one.round) for one in entries] == [("a", 1), ("b", 1), ("b", 2), ("c", 1), ("c", 2)]
    last = entries[-1]
    assert (last.task, last.owner, last.sites, last.state) == ("task-c", "olga", ("bank",), {"memory.lae": last.digest})
    assert last.start == Ancestor(run="b", round=2, rounds=2) and entries[0].start is None
    assert last.figures == {"plug_in": 1.0} and entries[1].figures == {}, "measured after the last round alone"
    assert 0 < entries[0].at <= last.at and last.digest == digest_bytes(b"c 2")
    with pytest.raises(NotFoundError, match="nowhere"):
        lineage(journal, "nowhere")


def test_a_roll_back_takes_what_came_after_and_all_that_went_on_from_there(journal: Journal) -> None:
    for name, start in {"a": "", "b": "a:1", "c": "a:2", "d": "c:1", "e": "d:2"}.items():
        run(journal, name, start=start)
    assert later(journal, "a", 1) == {"a": [2], "c": [1, 2], "d": [1, 2], "e": [1, 2]}
    roll_back(journal, "a", 1, by="olga", reason="it forgot")
    standing = {
        name: [one.round for one in lineage(journal, name) if one.run == name and not one.withdrawal]
        for name in "abcde"
    }
    assert standing == {"a": [1], "b": [1, 2], "c": [], "d": [], "e": []}
    assert ancestor(journal, "a") == Ancestor(run="a", round=1, rounds=1), "the newest that stands"
    with pytest.raises(InputError, match=r"a:2 was taken back by olga \(it forgot\); a:1 is the last that was not"):
        ancestor(journal, "a:2")
    with pytest.raises(InputError, match="c:2 was taken back .* and so was all of the run; name another"):
        ancestor(journal, "c")
    first, none = newest(journal, "a"), newest(journal, "c")
    assert first is not None and first.round == 1 and none is None
    roll_back(journal, "a", 1, by="zoe", reason="again")
    gone = lineage(journal, "a")[1].withdrawal
    assert gone is not None and (gone.by, gone.reason) == ("olga", "it forgot"), "who was first stays"
    assert [event.data["by"] for event in journal.events("e", kind="withdrawn")] == ["olga", "olga"]


@pytest.mark.parametrize(
    ("number", "reason", "error", "words"),
    [
        (1, "", InputError, "a roll-back needs a reason"),
        (3, "why", InputError, "has no round 3"),
        (1, "why", ConflictError, "run b is not over and works on what came after a:1"),
    ],
)
def test_what_cannot_be_rolled_back_is_said_and_nothing_is_taken(
    journal: Journal, number: int, reason: str, error: Any, words: str
) -> None:
    run(journal, "a")
    run(journal, "b", start="a:2", live=True)
    with pytest.raises(error, match=words):
        roll_back(journal, "a", number, by="olga", reason=reason)
    assert not journal.withdrawn("ab")
    roll_back(journal, "a", 2, by="olga", reason="nothing came after")
    assert not journal.withdrawn("ab")
