"""Taking a site out: what is done again, what is asked anew, and what is taken back."""

import json
from dataclasses import replace
from typing import Any

import pytest

from offsite.coordinator.runs.continuing import ancestor
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.replaying import CERTIFICATE, SIGNATURE
from offsite.coordinator.runs.steps.orders import Aggregate
from offsite.coordinator.runs.steps.results import fold
from offsite.coordinator.runs.supervisor import Supervisor
from offsite.coordinator.runs.withdrawing import again, take_back
from offsite.protos.documents import parse, to_json, to_plain
from offsite.protos.errors import ConflictError, InputError, NotFoundError
from offsite.protos.events import RoundDone
from offsite.protos.recipes import parse_one
from offsite.protos.security.signing import verify
from offsite.protos.spec import RunSpec, TrainingSpec

HOW: dict[str, str] = {"by": "olga", "reason": "consent was withdrawn"}


def do(stand: Any, name: str, spec: RunSpec, **granted: Any) -> None:
    """Do a run to its end, with the sites that it names."""
    start = ancestor(stand.journal, spec.start) if spec.start else None
    grant = to_plain(parse(Grant, to_plain(spec), where="run")) | {"continues": to_plain(start) if start else None}
    stand.journal.add_run(name, token=name, owner="olga", spec=to_json(spec), granted=grant | granted)
    stand.journal.begin_run(name, list(spec.sites))

    def rest(_: float) -> None:
        for task in stand.journal.tasks(name):
            if task.state == "offered":
                stand.upload(task)

    Supervisor(stand.home, name, perform=stand.perform, rest=rest).run()
    assert stand.journal.run(name).state == "completed", stand.journal.run(name).error


def orders(stand: Any) -> list[Any]:
    return [order for order in stand.done if isinstance(order, Aggregate)]


def test_a_run_of_one_round_is_folded_again_without_the_site_and_asks_nobody(stand: Any) -> None:
    do(stand, "r", RunSpec(model="m", sites=("bank", "ward"), min_sites=2, join=True))
    spec, replays = again(stand.journal, "r", "bank", **HOW)
    assert not spec.join, "the site is still there, and would come in again"
    assert (spec.sites, spec.min_sites, spec.rounds, spec.start) == (("ward",), 1, 1, "")
    do(stand, "n", spec, replays=to_plain(replays))
    before, after = orders(stand)
    (own,) = (replace(one, stamp=None) for one in before.updates if one.site == "ward")
    assert [replace(one, stamp=None) for one in after.updates] == [own] and after.last == before.last
    assert [event.kind for event in stand.journal.events("n") if event.kind == "update"] == [], "nobody was asked"


def test_a_longer_one_is_done_again_from_the_sites_first_round_and_the_rest_is_taken_back(stand: Any) -> None:
    act, stand.upload = stand.upload, lambda task: stand.close(task) if late(task) else act(task)

    def late(task: Any) -> bool:
        return bool(task.run == "r" and task.round == 0 and task.site == "bank")

    def build(order: bytes) -> Any:
        built, asked = whole(order), stand.done[-1]
        return replace(built, version=asked.continued.version) if asked.continued else built

    whole, stand._build = stand._build, build
    do(stand, "r", RunSpec(model="m", sites=("bank", "ward", "icu"), rounds=3))
    do(stand, "x", RunSpec(model="m", sites=("icu",), start="r:2"))
    spec, replays = again(stand.journal, "r", "bank", **HOW)
    assert (spec.sites, spec.rounds, spec.start, replays.round) == (("icu", "ward"), 2, "r:1", 2)
    do(stand, "n", spec, replays=to_plain(replays))
    offered = [(event.round, event.site) for event in stand.journal.events("n", kind="update")]
    assert offered == [(2, "icu"), (2, "ward")], "of the first round what they gave stands"
    for _ in range(2):
        take_back(stand.journal, replays)
    gone = stand.journal.withdrawn(["r", "x", "n"])
    assert gone.keys() == {("r", 2), ("r", 3), ("x", 1)}
    assert gone["r", 2].reason == "site bank was withdrawn from run r: consent was withdrawn"
    assert stand.journal.artifacts("r") == stand.journal.artifacts("x") == []
    assert {file.name for file in stand.journal.artifacts("n")} == {"adapter/model", CERTIFICATE, SIGNATURE}


def test_the_certificate_says_what_changed_and_bears_the_owners_signature(stand: Any) -> None:
    do(stand, "r", RunSpec(model="m", sites=("bank", "ward"), rounds=2))
    spec, replays = again(stand.journal, "r", "bank", **HOW)
    take_back(stand.journal, replays)
    do(stand, "n", spec, replays=to_plain(replays))
    files = {file.name: stand.home.blobs().path(file.digest).read_bytes() for file in stand.journal.artifacts("n")[1:]}
    verify(files[CERTIFICATE], files[SIGNATURE], stand.home.identity / "owner.pub", purpose="withdrawal")
    document, old, new = json.loads(files[CERTIFICATE]), History(stand.journal, "r"), History(stand.journal, "n")
    assert {key: document[key] for key in ("run", "site", "by", "reason", "again")} == {
        **{"run": "r", "site": "bank", "again": "n"},
        **HOW,
    }
    assert document["withdrawn"] == ["r:1", "r:2"]
    assert document["rounds"] == [
        {
            "round": at,
            "before": old[fold(at)].version.adapter,
            "after": new[fold(at)].version.adapter,
            "sites": ["ward"],
        }
        for at in (1, 2)
    ]


def test_what_cannot_be_done_again_is_refused_and_said(stand: Any) -> None:
    do(stand, "r", RunSpec(model="m", sites=("bank", "ward")))
    with pytest.raises(InputError, match="a withdrawal needs a reason"):
        again(stand.journal, "r", "bank", by="olga", reason=" ")
    with pytest.raises(NotFoundError, match="no version of run r has an update of site icu"):
        again(stand.journal, "r", "icu", **HOW)
    stand.journal.add_run("live", token="l", owner="olga", spec=b"{}", granted={"continues": {"run": "r", "round": 1}})
    with pytest.raises(ConflictError, match="run live is not over and holds the work of bank"):
        again(stand.journal, "r", "bank", **HOW)
    do(stand, "shrank", RunSpec(model="m", sites=("bank", "ward", "icu")))
    stand.journal.add_step("shrank", "roster:2", {"tiers": {"bank": "r8", "ward": "r8"}})
    stand.journal.add_step("shrank", "version:2", stand.journal.steps("shrank")["version:1"])
    with pytest.raises(InputError, match="other sites than bank left it after that"):
        again(stand.journal, "shrank", "bank", **HOW)
    do(stand, "alone", RunSpec(model="m", sites=("bank",)))
    with pytest.raises(InputError, match="bank is the only site of run alone"):
        again(stand.journal, "alone", "bank", **HOW)


def test_who_joined_meanwhile_joins_in_the_same_round_again(stand: Any) -> None:
    do(stand, "r", RunSpec(model="m", sites=("bank", "ward"), join=True))
    for number, joined in ((2, {"icu": "r8"}), (3, {})):
        tiers = {"bank": "r8", "icu": "r8", "ward": "r8"}
        stand.journal.add_step("r", f"roster:{number}", {"tiers": tiers, "joined": joined})
        stand.journal.add_step("r", f"version:{number}", stand.journal.steps("r")["version:1"])
        stand.journal.add_event("r", RoundDone(round=number, sites=3, figures={}))
    spec, replays = again(stand.journal, "r", "bank", **HOW)
    assert (spec.sites, spec.rounds, replays.joins, replays.joined) == (("ward",), 3, True, {1: {"icu": "r8"}})
    stand.journal.enrol("stranger")
    do(stand, "n", spec, replays=to_plain(replays))
    history = History(stand.journal, "n")
    assert [sorted(history.tiers(at)) for at in range(3)] == [["ward"], ["icu", "ward"], ["icu", "ward"]]


def test_where_sites_are_held_to_the_start_none_of_the_first_round_is_kept(stand: Any) -> None:
    training = TrainingSpec(retention=parse_one("replay"))
    do(stand, "r", RunSpec(model="m", sites=("bank", "ward"), rounds=2, training=training))
    spec, replays = again(stand.journal, "r", "bank", **HOW)
    assert not replays.keeps
    do(stand, "n", spec, replays=to_plain(replays))
    assert [event.round for event in stand.journal.events("n", kind="update")] == [1, 2]
