"""Partial training at a site: what is outside of the part is frozen, has no state, and does not leave."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client.site.job import TrainerJob
from offsite.client.site.outcome import turn
from offsite.client.site.training import train
from offsite.emulator import bundle, methods, parts
from offsite.emulator.outline import Outline
from offsite.emulator.parts.training import Trained, freeze, whole_schema
from offsite.emulator.tuning.adapting import adapted
from offsite.kernels.schema import groups, only
from offsite.protos import tensors
from offsite.protos.documents import from_json
from offsite.protos.spec import Choice, UpdateMetrics

from .ranks import Loaded

OUTLINE = Outline(layers=(0, 2, 3, 5), trainable=(0, 5))
TOP = (Choice(name="top", settings={"share": 0.125}),)


@pytest.fixture
def blocks(job: Any, site_files: Path, tmp_path: Path) -> Any:
    """A maker of jobs that train whole layers."""
    model, _ = bundle.load(site_files / "bundle", layout=bundle.Layout(OUTLINE), dtype="auto")
    tensors.save(tmp_path / "start.safetensors", methods.make("blocks", {}).start(model, OUTLINE.places, seed=0))

    def make(part: str, **more: Any) -> TrainerJob:
        training = {"steps": 3, "learning_rate": 1e-3, "part": part} | more.pop("training", {})
        one = job(training=training, **more)
        task = replace(one.task, method=Choice(name="blocks"))
        return replace(one, adapter=str(tmp_path / "start.safetensors"), task=task)

    return make


def trained(job: TrainerJob, folder: Path) -> tuple[dict[str, torch.Tensor], UpdateMetrics]:
    torch.set_num_threads(1)
    train(job, say=lambda event, **fields: None, rendezvous=folder / "rendezvous")
    metrics = from_json(UpdateMetrics, (Path(job.out) / "metrics.json").read_bytes(), where="metrics")
    return tensors.load(Path(job.out) / "update.safetensors"), metrics


def part_of(job: TrainerJob, loaded: Loaded, chosen: tuple[int, ...] = ()) -> Trained:
    choice = job.task.training.part
    schema = whole_schema(loaded.method, loaded.broadcast)
    part = parts.make(choice.name, choice.settings)
    return Trained(only(schema, part.groups(schema, turn(job.task), chosen)), chosen)


@pytest.mark.parametrize("part", ["lisa(layers=1)", "half", "by-capability(shards=2)"])
def test_only_what_trains_has_an_optimisers_state_and_all_else_keeps_its_bytes(blocks: Any, part: str) -> None:
    job = blocks(part)
    loaded = Loaded(job)
    of = part_of(job, loaded)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    names = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    loaded.trained = freeze(loaded.trained, of)
    engine: Any = loaded.engine()
    for batch in loaded.batches[:2]:
        engine.step(batch)
    assert {id(p) for p in engine._optimizer.state} == {id(p) for p in loaded.trained.values()}
    live = {names[id(parameter)] for parameter in loaded.trained.values()}
    assert loaded.trained.keys() == of.schema.keys() and 0 < len(live) < len(loaded.broadcast)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in live), name


def test_an_update_of_one_layer_of_two_has_half_the_bytes(blocks: Any, tmp_path: Path) -> None:
    sizes = {}
    for part in ("all", "lisa(layers=1)"):
        job = blocks(part)
        update, metrics = trained(job, tmp_path)
        assert metrics.chosen == ()
        layers = {int(key.partition(".")[0]) for key in update}
        sizes[part] = sum(tensor.nbytes for tensor in update.values())
    assert len(layers) == 1 and sizes["lisa(layers=1)"] * 2 == sizes["all"]
    start = tensors.load(Path(job.adapter))
    assert all(not torch.equal(tensor, start[key]) for key, tensor in update.items())


def test_each_round_trains_another_half_that_is_whole_groups(blocks: Any, tmp_path: Path) -> None:
    first, later = blocks("half"), blocks("half")
    later = replace(later, task=replace(later.task, round=1))
    one, other = (set(trained(job, tmp_path)[0]) for job in (first, later))
    assert one != other and len(one) == len(other)
    start = tensors.load(Path(first.adapter))
    assert one == set(part_of(first, Loaded(first)).schema) and one < start.keys()


@pytest.mark.parametrize("part", ["lisa(layers=1)", "half", "ist(share=0.5)", "by-capability(shards=3)"])
def test_the_owner_trains_what_a_site_of_its_name_does_bit_for_bit(job: Any, tmp_path: Path, part: str) -> None:
    one = job(training={"steps": 3, "part": part})
    site, owner = Loaded(one), Loaded(one)
    model, _ = bundle.load(Path(one.bundle), layout=bundle.described(one.manifest), dtype="auto")
    tuned = adapted(model, owner.method, owner.places, owner.encoded, one.task.training)
    found = owner.method.state(tuned, owner.places)
    moved = {key for key, tensor in found.items() if not torch.equal(tensor, site.broadcast[key])}
    named = replace(one, task=replace(one.task, site="clinic"))
    own = parts.make(one.task.training.part.name, one.task.training.part.settings)
    if own.alike:
        update, _ = trained(named, tmp_path)
        assert update.keys() == moved and all(torch.equal(update[key], found[key]) for key in update)
    else:
        assert {int(key.partition(".")[0]) for key in moved} in ({0}, {5})


def test_a_site_tells_which_layers_it_chose_and_sends_those_alone(job: Any, tmp_path: Path) -> None:
    update, metrics = trained(job(training={"steps": 3, "part": "ist(share=0.5)"}), tmp_path)
    assert len(metrics.chosen) == 1 and {int(key.partition(".")[0]) for key in update} == {*metrics.chosen}
    again, told = trained(job(training={"steps": 3, "part": "ist(share=0.5)"}), tmp_path)
    assert told.chosen == metrics.chosen and all(torch.equal(again[key], update[key]) for key in update)


def test_what_was_left_out_of_a_layer_waits_until_it_trains_again(top: Any, job: Any, tmp_path: Path) -> None:
    """Over rounds in which another layer trains, and is fed back bit for bit then."""
    rounds = [job(training={"steps": 2, "part": "lisa(layers=1)"}, upload=TOP) for _ in range(12)]
    rounds = [replace(one, task=replace(one.task, round=number)) for number, one in enumerate(rounds)]
    loaded = Loaded(rounds[0])
    drawn = [min(part_of(one, loaded).schema)[0] for one in rounds]
    first = next(at for at in range(10) if drawn[at] != drawn[at + 1])
    left = Path(rounds[0].out) / "residual.safetensors"
    trained(rounds[first], tmp_path)
    kept = left.rename(tmp_path / "kept")
    trained(replace(rounds[first + 1], residual=str(kept)), tmp_path)
    before, after = tensors.load(kept), tensors.load(left)
    assert before.keys() == after.keys(), "there is one of every tensor, in each round"
    own, others = (
        {key for key in before if (key.partition(".")[2][0] == drawn[first]) is mine} for mine in (True, False)
    )
    assert any(before[key].any() for key in own) and not any(before[key].any() for key in others)
    assert all(torch.equal(after[key], before[key]) for key in own) and any(after[key].any() for key in others)


def test_a_part_that_leaves_nothing_out_of_what_was_handed_out_is_a_fault_of_the_task(job: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="lisa draws 2 layers in each round, and the adapter has 2") as error:
        trained(job(training={"part": "lisa(layers=2)"}), tmp_path)
    assert error.value.reason == "FAULT_EMULATOR"  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "part"), [(2, "lisa(layers=1)"), (3, "lisa(layers=1)"), (3, "ist(share=0.5)"), (3, "half")]
)
def test_two_processes_train_the_part_that_one_does(
    start: Any, job: Any, tmp_path: Path, stage: int, part: str
) -> None:
    training = {"steps": 4, "learning_rate": 1e-2, "part": part}
    two = job(name="deepspeed", zero_stage=stage, processes=2, threads=2, training=training)
    assert list(start(two, tmp_path / "task").events())[-1] == {"event": "done"}
    update = tensors.load(Path(two.out) / "update.safetensors")
    metrics = json.loads((Path(two.out) / "metrics.json").read_text())
    alone, told = trained(replace(job(training=training), out=str(tmp_path / "alone")), tmp_path)
    assert update.keys() == alone.keys() and tuple(metrics["chosen"]) == told.chosen
    whole = tensors.load(Path(two.adapter))
    assert update.keys() < whole.keys() and groups(part_of(two, Loaded(job(training=training)), told.chosen).schema)
    for key, tensor in update.items():
        torch.testing.assert_close(tensor, alone[key], atol=1e-4, rtol=0)
        assert not torch.equal(tensor, whole[key])
