"""The supervisor as a function: rounds, attempts, who is left out, and what ends a run."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.runs import supervisor
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import GRANT
from offsite.coordinator.runs.needs import NoRoom
from offsite.coordinator.runs.steps.orders import Aggregate, Attack, Build, Evaluate, Publish, Realign, Tune, Update
from offsite.coordinator.runs.supervisor import TRIES, Lost
from offsite.coordinator.store import Unusable
from offsite.coordinator.store.blobs import Folder
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import from_json, to_plain
from offsite.protos.errors import ResourceError
from offsite.protos.events import Cancelled
from offsite.protos.security.signing import verify
from offsite.protos.spec import Choice, TaskSpec, TrainingSpec
from offsite.protos.telemetry.logs import subject

EXAM = {"exam": "held-out.jsonl"}
SITES = ("bank", "ward")


def asked(stand: Any, kind: type[Any]) -> list[Any]:
    return [order for order in stand.done if isinstance(order, kind)]


def told(stand: Any, kind: str) -> list[Any]:
    return [event for event in stand.journal.events("r") if event.kind == kind]


def test_each_round_starts_from_the_last_and_ends_in_a_version(stand: Any) -> None:
    stand.submit("bank", "ward", rounds=3)
    assert stand.run().state == "completed"
    rounds = asked(stand, Aggregate)
    assert [[update.site for update in order.updates] for order in rounds] == 3 * [["bank", "ward"]]
    first, second, third = (order.last.broadcast["r8"].digest for order in rounds)
    tasks = [from_json(TaskSpec, task.spec, where="task") for task in stand.journal.tasks("r") if task.site == "ward"]
    assert [task.adapter for task in tasks] == [first, second, third] and len({first, second, third}) == 3
    assert asked(stand, Publish)[0].adapter == stand.journal.steps("r")["version:3"]["version"]["adapter"]
    assert [event.round for event in told(stand, "round")] == [1, 2, 3]


@pytest.mark.parametrize(("span", "places"), [("round", [(0, 0)] * 3), ("run", [(0, 8), (4, 4), (8, 0)])])
def test_a_task_says_where_its_round_is_on_a_schedule_over_the_run(
    stand: Any, span: Any, places: list[tuple[int, int]]
) -> None:
    stand.submit("ward", rounds=3, training=TrainingSpec(steps=4, span=span))
    stand.run()
    rules = [from_json(TaskSpec, task.spec, where="task").training for task in stand.journal.tasks("r")]
    assert [(one.before, one.after) for one in rules] == places


def test_a_task_is_signed_and_says_nothing_of_the_other_sites(stand: Any) -> None:
    stand.submit("bank", "ward", method=Choice(name="lora", settings={"rank": 4, "ranks": {"bank": 2}}))
    stand.run()
    for task in stand.journal.tasks("r"):
        verify(task.spec, task.signature, stand.home.identity / "owner.pub", purpose="task")
        assert from_json(TaskSpec, task.spec, where="task").method.settings == {"rank": 4}


def previous(stand: Any) -> dict[tuple[int, str, int], str | None]:
    """Of each task (round, site, attempt) the update that it goes on from."""
    tasks = stand.journal.tasks("r")
    return {(t.round, t.site, t.attempt): from_json(TaskSpec, t.spec, where="task").previous for t in tasks}


def test_a_task_names_the_sites_newest_update_where_a_stage_feeds_back(stand: Any, top: Any) -> None:
    def act(task: Any) -> None:
        if (task.round, task.site) in ((0, "bank"), (1, "ward")) and task.attempt == 0:
            stand.close(task)
        elif (task.round, task.site) == (1, "bank"):
            stand.close(task)
        else:
            stand.upload(task)

    stand.act = act
    stand.submit("bank", "ward", rounds=3, upload=(Choice(name="top"),))
    assert stand.run().state == "completed"
    names = {(number, site): digest_bytes(f"update {number} {site}".encode()) for number in (0, 1) for site in SITES}
    assert previous(stand) == {
        **{(0, "bank", 0): None, (0, "bank", 1): None, (0, "ward", 0): None},
        **{(1, "bank", 0): names[0, "bank"], (1, "bank", 1): names[0, "bank"]},
        **{(1, "ward", 0): names[0, "ward"], (1, "ward", 1): names[0, "ward"]},
        **{(2, "bank", 0): names[0, "bank"], (2, "ward", 0): names[1, "ward"]},
    }


def test_where_nothing_is_fed_back_a_task_names_no_update(stand: Any) -> None:
    stand.submit("bank", "ward", rounds=2, upload=(Choice(name="noise"),))
    stand.run()
    assert set(previous(stand).values()) == {None}


def test_what_is_measured_is_told_with_the_step_that_measured_it(stand: Any) -> None:
    stand.submit("ward", rounds=3, evaluation=EXAM, evaluate_every=2)
    stand.run()
    names = ["base_zero_shot", "emulator_zero_shot", "plug_in:2", "plug_in:3", "emulator_tuned", "plug_in"]
    assert [event.data["name"] for event in told(stand, "figure")] == names
    bare, emulator, between, plugged, tuned = asked(stand, Evaluate)
    assert (bare.manifest, bare.adapter) == (None, None) and emulator.adapter is None
    assert (between.manifest, plugged.manifest) == (None, None) and plugged.adapter != between.adapter
    assert tuned.adapter in (plugged.adapter, between.adapter), "the better one"


@pytest.mark.parametrize("text", ["task.jsonl", ""])
def test_the_base_is_tuned_where_it_is_attacked_and_the_owner_has_text_of_the_task(stand: Any, text: str) -> None:
    stand.submit("ward", evaluation=EXAM, attack_steps=2, attack_text=text)
    protection = json.loads(stand.run().report)["protection"]
    assert len(asked(stand, Attack)) == 1 and told(stand, "figure")[-1].data["name"] == "attack"
    if text:
        (order,) = asked(stand, Tune)
        assert order.trainable == (0,) and told(stand, "figure")[-2].data["name"] == "base_tuned"
        assert protection["lost"] > 0
        assert protection["reason"].endswith("tuned on the owner's own text of the task, not the sites'")
    else:
        assert asked(stand, Tune) == [] and protection["lost"] is None
        assert protection["reason"].endswith("what tuning the base itself gives was not measured")


def test_what_each_site_gave_is_measured_by_folding_the_round_without_it(stand: Any) -> None:
    stand.submit("bank", "town", evaluation={"exam": "held-out.jsonl"}, contributions=True, rounds=2)
    report = json.loads(stand.run().report)
    asked = [one for one in stand.done if isinstance(one, Aggregate) and one.weights]
    assert [(one.round, dict(one.weights)) for one in asked] == [
        (number, {site: 1.0}) for number in (0, 1) for site in ("town", "bank")
    ]
    assert all([update.site for update in one.updates] == [*one.weights] for one in asked)
    steps = stand.journal.steps("r")
    for number in (1, 2):
        told, names = report["rounds"][number - 1]["sites"], (f"plug_in:{number}:without:", f"plug_in:{number}")
        for site in ("bank", "town"):
            losses = [steps[name]["sets"]["exam"]["nll"] / 1000 for name in (names[0] + site, names[1])]
            assert told[site]["gain"] == pytest.approx(losses[0] - losses[1]) and told[site]["cosine"] == 0.5


def test_what_a_site_gave_alone_is_compared_with_nothing(stand: Any) -> None:
    stand.submit("bank", evaluation={"exam": "held-out.jsonl"}, contributions=True)
    report = json.loads(stand.run().report)
    assert report["rounds"][0]["sites"]["bank"]["gain"] is None
    assert not [one for one in stand.done if isinstance(one, Aggregate) and one.weights]


def test_what_sites_train_from_is_measured_meanwhile_and_realigned_before(stand: Any) -> None:
    def measure(order: bytes) -> Any:
        tasks = stand.journal.tasks("r")
        seen.append((len(tasks), sum(task.state == "uploaded" for task in tasks), len(asked(stand, Realign))))
        return whole(order)

    seen: list[tuple[int, int, int]] = []  # tasks offered, tasks done, re-alignments
    whole, stand._evaluate = stand._evaluate, measure
    stand.submit("ward", rounds=3, evaluation=EXAM, evaluate_every=1, realign_steps=5)
    stand.run()
    assert seen == [(1, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 2), (3, 3, 2), (3, 3, 2)]


def test_the_next_round_trains_on_the_bundle_that_was_realigned(stand: Any) -> None:
    stand.submit("ward", rounds=3, realign_steps=5)
    stand.run()
    manifests = [from_json(TaskSpec, task.spec, where="task").manifest for task in stand.journal.tasks("r")]
    first, second = asked(stand, Realign)
    assert manifests[:2] == [first.manifest, second.manifest] and len(set(manifests)) == 3
    assert second.adapter == stand.journal.steps("r")["version:2"]["version"]["adapter"]


def test_a_site_that_fails_is_asked_once_more_and_then_left_out(stand: Any) -> None:
    stand.act = lambda task: stand.close(task) if task.site == "bank" else stand.upload(task)
    stand.submit("bank", "ward")
    assert stand.run().state == "completed"
    assert [(task.site, task.attempt, task.state) for task in stand.journal.tasks("r")] == [
        ("bank", 0, "failed"),
        ("bank", 1, "failed"),
        ("ward", 0, "uploaded"),
    ]
    assert [update.site for update in asked(stand, Aggregate)[0].updates] == ["ward"]


def test_a_site_that_refuses_is_not_asked_again_and_too_few_updates_end_the_run(stand: Any) -> None:
    stand.act = lambda task: stand.close(task, "refused", "policy")
    stand.submit("bank", "ward", min_sites=2)
    error = "round 1 got 0 of at least 2 updates (bank: refused: policy; ward: refused: policy)"
    run = stand.run()
    assert (run.state, run.error) == ("failed", error) and len(stand.journal.tasks("r")) == 2
    assert told(stand, "failed")[0].data == {"error": error} and asked(stand, Aggregate) == []


def test_an_error_names_some_of_very_many_sites(stand: Any) -> None:
    stand.act = lambda task: stand.close(task, "refused", "policy")
    stand.submit(*(f"site-{number}" for number in range(30)))
    assert stand.run().error.endswith("; and 10 more)")


@pytest.mark.parametrize("step", ["build", "evaluate", "aggregate", "publish"])
def test_what_a_step_says_ends_the_run(stand: Any, step: str) -> None:
    def full(_: bytes) -> None:
        raise ResourceError("the disk is full")

    stand.submit("ward", evaluation=EXAM)
    setattr(stand, f"_{step}", full)
    run = stand.run()
    assert (run.state, run.error) == ("failed", "the disk is full")


def test_a_fault_of_ours_ends_the_run_with_a_word(stand: Any) -> None:
    stand.submit("ward")
    stand._aggregate = lambda order: {}["missing"]
    run = stand.run()
    assert (run.state, run.error) == ("failed", "internal error: KeyError: 'missing'")


def judged(stand: Any, **policy: Any) -> Any:
    """The end of a researcher's run under a policy."""
    stand.home.keep(OwnerPolicy(**policy))
    stand.submit("bank", "ward")
    stand.journal.add_step("r", GRANT.name, to_plain(Grant(model="m", role="researcher")))
    return stand.run()


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"max_adapter_mib": 1e-6}, "max_adapter_mib"),
        ({"max_sites": 1}, "max_sites"),
        ({"max_disclosed": 0.5}, "max_disclosed"),
    ],
)
def test_what_the_policy_refuses_of_what_was_built_is_offered_to_no_site(
    stand: Any, policy: dict[str, Any], reason: str
) -> None:
    assert f"the owner's policy refuses the run ({reason})" in judged(stand, **policy).error
    assert not stand.journal.tasks("r") and not stand.journal.steps("r").keys() & {"version:0", "disclosure"}


def test_what_is_disclosed_is_kept_once(stand: Any) -> None:
    assert judged(stand).state == "completed"
    kept = stand.journal.steps("r")
    assert kept["disclosure"]["portions"]["2"] == [3, 0, 3, ""] and not kept["version:0"]["portions"]


def test_where_nothing_is_wrong_with_the_run_it_is_left_open(stand: Any) -> None:
    def away(_: bytes) -> None:
        raise Lost

    whole, stand._aggregate = stand._aggregate, away
    stand.submit("ward")
    with pytest.raises(Lost):
        stand.run()
    assert stand.journal.run("r").state == "running"
    stand._aggregate = whole
    assert stand.run().state == "completed" and len(asked(stand, Build)) == 1, "what was done is not done again"


@pytest.mark.parametrize("step", ["build", "aggregate", "publish"])
def test_a_step_that_cannot_use_a_store_is_done_again_until_it_can(stand: Any, step: str) -> None:
    waits = iter(range(2 * TRIES))  # more often than a step may end its process

    def away(order: bytes) -> Any:
        if next(waits, None) is not None:
            raise Unusable("s3://bucket: its server does not answer")
        notes.append(stand.journal.run("r").note)
        return whole(order)

    notes, whole = list[str](), getattr(stand, f"_{step}")
    setattr(stand, f"_{step}", away)
    stand.submit("ward")
    assert stand.run().state == "completed"
    warnings = [event.data["message"] for event in told(stand, "warning")]
    assert warnings == [f"step {step} waits until the coordinator can use its stored files; its log says more"]
    assert notes == warnings and stand.journal.run("r").note == ""


def test_a_step_that_no_node_is_large_enough_for_waits_a_while_and_then_ends_the_run(
    stand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(step: str, *_: Any) -> bytes:
        raise NoRoom(f"step {step} needs more")

    monkeypatch.setattr(stand, "perform", refuse)
    rests: list[float] = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 3:
            monkeypatch.setattr(supervisor, "ROOM_S", 0.0)

    monkeypatch.setattr(stand, "rest", rest)
    stand.submit("bank")
    assert stand.run().error == "step build needs more" and len(rests) == 3
    assert [event.data["message"] for event in told(stand, "warning")] == [
        "step build needs more; it waits for one for 5 minutes"
    ]


def test_a_run_that_waits_for_a_store_can_be_cancelled(stand: Any) -> None:
    def away(_: bytes) -> None:
        raise Unusable("s3://bucket: its server does not answer")

    stand.submit("ward")
    stand._build, stand.rest = away, lambda _: stand.journal.end_run("r", Cancelled(error="cancelled by alice"))
    assert stand.run().state == "cancelled"


def test_updates_that_cannot_be_looked_at_are_not_lost(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Any, digest: str) -> None:
        raise Unusable("s3://bucket: its server does not answer")

    stand.submit("ward")
    with monkeypatch.context() as gone, pytest.raises(Unusable):
        gone.setattr(Folder, "path", away)
        stand.run()
    assert stand.run().state == "completed" and len(stand.journal.tasks("r")) == 1


def test_a_step_that_ends_its_process_again_and_again_ends_the_run(stand: Any) -> None:
    def away(_: bytes) -> None:
        raise Lost

    stand.submit("ward")
    stand._build = away
    for _ in range(TRIES):
        with pytest.raises(Lost):
            stand.run()
    run = stand.run()
    assert run.state == "failed" and f"step version:0 was begun {TRIES} times" in run.error and "memory" in run.error
    assert "the last time" not in run.error and not [*stand.journal.events("r", kind="lost")]


def test_what_ended_a_step_is_told_and_the_last_of_it_where_it_ends_the_run(stand: Any) -> None:
    tries = itertools.count(1)

    def away(_: bytes) -> None:
        raise Lost(f"step build: its process ended with exit code -{next(tries)}")

    stand.submit("ward")
    stand._build = away
    for _ in range(TRIES):
        with pytest.raises(Lost):
            stand.run()
    told = [event.data for event in stand.journal.events("r", kind="lost")]
    said = "step build: its process ended with exit code -"
    assert told == [{"step": "version:0", "message": f"{said}{number}"} for number in range(1, TRIES + 1)]
    assert f"; the last time: {said}{TRIES}; " in stand.run().error


def test_a_run_that_is_cancelled_is_not_worked_on_any_more(stand: Any) -> None:
    stand.act = lambda _: stand.journal.end_run("r", Cancelled(error="cancelled by alice"))
    stand.submit("ward")
    assert stand.run().state == "cancelled" and asked(stand, Aggregate) == []
    assert [event.kind for event in stand.journal.events("r")][-1] == "cancelled"


def test_what_a_step_gave_after_the_run_was_cancelled_is_not_kept(stand: Any) -> None:
    def late(order: bytes) -> Any:
        stand.journal.end_run("r", Cancelled(error="cancelled by alice"))
        return whole(order)

    whole, stand._aggregate = stand._aggregate, late
    stand.submit("ward")
    assert stand.run().state == "cancelled" and "version:1" not in stand.journal.steps("r")


def test_an_update_that_rots_is_asked_for_once_more_and_its_file_is_mended(stand: Any) -> None:
    def rot(task: Any) -> None:
        stand.upload(task)
        if task.attempt == 0:
            stand.home.blobs().path(stand.journal.tasks("r")[0].update).write_bytes(b"Update")

    stand.act = rot
    stand.submit("ward")
    assert stand.run().state == "completed"
    lost, kept = stand.journal.tasks("r")
    assert lost.state == "failed" and "was lost at the coordinator" in lost.message
    assert (lost.update, lost.norm) == ("", None)
    (update,) = asked(stand, Aggregate)[0].updates
    assert replace(update, stamp=None) == Update(site="ward", digest=kept.update, examples=3, norm=0.5)
    assert stand.home.blobs().path(kept.update).is_file()


def test_what_a_step_is_about_is_known_to_whatever_does_it(stand: Any) -> None:
    perform, subjects = stand.perform, []

    def note(*order: Any) -> bytes:
        subjects.append(subject())
        return bytes(perform(*order))

    stand.perform = note
    stand.submit("school", rounds=2)
    assert stand.run().state == "completed" and subject() == {}
    told = [(one["run"], one.get("round"), one["step"]) for one in subjects]
    assert told[:1] + told[-1:] == [("r", None, "build"), ("r", None, "publish")]
    assert ("r", 1, "aggregate") in told and ("r", 2, "aggregate") in told
