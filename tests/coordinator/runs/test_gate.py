"""A gate that does not hold publishes nothing, over a coordinator's death, until the owner lets it out."""

import json
from typing import Any

import pytest

from offsite.coordinator.gates import Finding
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.runs.continuing import ancestor
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.legality import judge
from offsite.coordinator.runs.releasing import let_out
from offsite.coordinator.runs.steps.orders import Gate, Publish
from offsite.coordinator.runs.steps.results import GATE, Verdict
from offsite.coordinator.runs.supervisor import Lost
from offsite.protos.documents import to_json, to_plain
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Choice, RunSpec

EXAM = {"exam": "held-out.jsonl"}
CHECK = (Choice(name="licence"),)


def judging(stand: Any, holds: bool) -> None:
    def gate(order: bytes) -> Verdict:
        stand._take(Gate, order)
        return Verdict(findings=(Finding(check="licence", holds=holds, reason="no licence"),))

    stand._gate = gate


def submit(stand: Any, **fields: Any) -> None:
    spec, grant = RunSpec(model="m", **fields), Grant(model="m", gate=CHECK, **fields)
    stand.journal.add_run("r", token="t", owner="alice", spec=to_json(spec), granted=to_plain(grant))
    stand.journal.begin_run("r", ["ward"])


def published(stand: Any) -> list[str]:
    return [file.name for file in stand.journal.artifacts("r")]


def test_what_holds_is_published_and_gone_on_from(stand: Any) -> None:
    judging(stand, True)
    submit(stand, evaluation=EXAM)
    report = json.loads(stand.run().report)
    assert published(stand) == ["adapter/model"] and ancestor(stand.journal, "r").round == 1
    assert report["gate"] == [{"check": "licence", "holds": True, "reason": "no licence"}]
    (order,) = [one for one in stand.done if isinstance(one, Gate)]
    assert order.figures.keys() == {"base_zero_shot", "plug_in"}
    assert order.adapter == next(one for one in stand.done if isinstance(one, Publish)).adapter
    with pytest.raises(ConflictError, match="not held back"):
        let_out(stand.journal, "r", 0, by="olga", reason="why")


def test_what_does_not_hold_is_held_back_wherever_the_coordinator_dies(stand: Any) -> None:
    judging(stand, False)
    submit(stand)
    with pytest.raises(InputError, match="none of its rounds is done"):
        ancestor(stand.journal, "r:1")
    whole, seen = stand.perform, set[str]()

    def dies(step: str, spec: bytes, order: bytes, needs: Any) -> bytes:
        result = bytes(whole(step, spec, order, needs))
        if step not in seen:
            seen.add(step)
            raise Lost("killed as it ended")
        return result

    stand.perform = dies
    for _ in range(4):
        with pytest.raises(Lost):
            stand.run()
        if stand.journal.rounds_done(["r"]).get("r"):
            with pytest.raises(InputError, match="r:1 is not released: the gate of run r has not judged|held back by"):
                ancestor(stand.journal, "r:1")
        assert published(stand) == []
    row = stand.run()
    assert seen == {"build", "aggregate", "gate", "publish"} and row.state == "completed" and published(stand) == []
    assert len(stand.journal.events("r", kind="held")) == 1
    for start in ("r", "r:1"):
        with pytest.raises(InputError, match=r"held back by its run's gate \(licence: no licence\); ask the owner"):
            ancestor(stand.journal, start)


def test_the_owner_lets_out_a_version_or_all_and_the_trail_says_who_and_why(stand: Any) -> None:
    judging(stand, False)
    submit(stand, rounds=2)
    with pytest.raises(ConflictError, match="no gate has judged"):
        let_out(stand.journal, "r", 0, by="olga", reason="why")
    stand.run()
    with pytest.raises(InputError, match="a release needs a reason"):
        let_out(stand.journal, "r", 1, by="olga", reason=" ")
    with pytest.raises(InputError, match="has no round 3; r:2 is its last"):
        let_out(stand.journal, "r", 3, by="olga", reason="why")
    let_out(stand.journal, "r", 1, by="olga", reason="read by hand")
    assert ancestor(stand.journal, "r:1").round == 1 and published(stand) == [], "its files are those of round 2"
    with pytest.raises(InputError, match="r:2 is held back"):
        ancestor(stand.journal, "r")
    for by in ("olga", "zoe"):
        let_out(stand.journal, "r", 0, by=by, reason="the licence came by post")
    assert published(stand) == ["adapter/model"] and ancestor(stand.journal, "r").round == 2
    trail = [(one.round, one.data["by"], one.data["reason"]) for one in stand.journal.events("r", kind="released")]
    assert trail == [(1, "olga", "read by hand"), (0, "olga", "the licence came by post")]
    assert History(stand.journal, "r")[GATE].against == "licence: no licence"


def test_an_owners_gate_is_every_researchers_and_no_run_can_take_it_away(tmp_path: Any) -> None:
    (tmp_path / "owner.toml").write_text(
        'gate = "refusal(probe=\'harm\')"\n[probes]\nharm = "harm.jsonl"\n[models]\nm = "org/m"\n'
    )
    policy = OwnerPolicy.load(tmp_path / "owner.toml")
    spec = RunSpec(model="m", gate=CHECK)
    grant = policy.grant(spec, role="researcher", person="alice", live=0)
    assert [one.name for one in grant.gate] == ["licence", "refusal"]
    assert grant.probes == {"harm": str(tmp_path / "harm.jsonl")}
    assert policy.grant(spec, role="owner", person="olga", live=0).gate == CHECK


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ("figure", "looks at the figures: give held-out examples"),
        ("canary(planted='a', others='b')", "gate: canary reads the probe 'a'; name its file in probes"),
        ("canaries", "gate: .*canaries"),
    ],
)
def test_a_gate_that_has_nothing_to_look_at_is_refused(check: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        judge(RunSpec(model="m", gate=(parse_one(check),)))
