"""Retentions at a site: they do what they say in its steps, in engines that take them, and nothing at strength 0."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client.site.engines import ENGINES, Ranks
from offsite.client.site.job import TrainerJob
from offsite.client.site.policy import Policy
from offsite.client.site.training import train
from offsite.emulator import methods, retention
from offsite.kernels.schema import Rule, Schema
from offsite.protos import tensors
from offsite.protos.errors import InputError, MismatchError, RefusedError
from offsite.protos.spec import Ancestor

from .ranks import Loaded

RANKS = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def holding(job: Any, site_files: Path, tmp_path: Path) -> Any:
    """A maker of jobs whose training is held to an adapter that is not the broadcast."""
    broadcast = tensors.load(site_files / "adapter.safetensors")

    def make(recipe: str, *, apart: float = 0.05, **more: Any) -> TrainerJob:
        one: TrainerJob = job(training={"retention": recipe, "steps": 4} | more.pop("training", {}), **more)
        choice, method = one.task.training.retention, methods.make(one.task.method.name, one.task.method.settings)
        schema: Schema = method.schema(broadcast)
        keeps: Any = retention.make(choice.name, choice.settings)
        before = {
            key: tensor + apart * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
            for key, tensor in broadcast.items()
            if schema[key].rule is not Rule.FIXED
        }
        kept = keeps.remember(before, schema, {"fisher": {key: torch.ones_like(one) for key, one in before.items()}})
        if anchor := keeps.anchor(before, schema, kept):
            tensors.save(tmp_path / "anchor.safetensors", anchor)
            one = replace(one, anchor=str(tmp_path / "anchor.safetensors"))
        return replace(one, task=replace(one.task, continues=Ancestor(run="before", round=1, rounds=1)))

    return make


def trained(job: TrainerJob, folder: Path) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    train(job, say=lambda event, **fields: None, rendezvous=folder / "rendezvous")
    return tensors.load(Path(job.out) / "update.safetensors")


@pytest.mark.parametrize("recipe", ["ewc(strength=0.0)", "orthogonal(strength=0.0)", "surgery(alpha=0.0)"])
def test_at_strength_zero_an_update_has_the_bytes_of_one_without(holding: Any, recipe: str, tmp_path: Path) -> None:
    plain, none = trained(holding("none"), tmp_path), trained(holding(recipe), tmp_path)
    assert plain.keys() == none.keys() and all(torch.equal(plain[key], none[key]) for key in plain)


@pytest.mark.parametrize("recipe", ["ewc(strength=1e3)", "orthogonal(strength=1e3)", "surgery(alpha=0.5)"])
def test_what_trains_stays_nearer_to_what_it_is_held_to(holding: Any, recipe: str, tmp_path: Path) -> None:
    plain, near = trained(holding("none"), tmp_path), trained(holding(recipe), tmp_path)
    anchor = tensors.load(tmp_path / "anchor.safetensors")
    if any(name.startswith("basis.") for name in anchor):
        keeps: Any = retention.make("orthogonal", {})
        distance = [float(keeps.penalty(values, anchor)) for values in (near, plain)]
    else:
        part = next(iter(anchor)).partition(".")[0]
        distance = [
            sum(float((values[key] - anchor[f"{part}.{key}"]).square().sum()) for key in values)
            for values in (near, plain)
        ]
    assert distance[0] < 0.9 * distance[1]


def test_surgery_moves_the_values_once_after_each_step(holding: Any) -> None:
    """0.1 of the way, whatever the number of layers, and not 0.718 as where each of twelve layers moves them all."""
    job = holding("surgery(alpha=0.1)", training={"learning_rate": 1e-30})
    loaded, anchor = Loaded(job), tensors.load(Path(job.anchor))
    before = {key: value.detach().clone() for key, value in loaded.trained.items()}
    engine: Any = ENGINES["plain"](loaded.model, loaded.trained, job.task.training, job.engine, RANKS, anchor=anchor)
    engine.step(loaded.batches[0])
    for key, value in loaded.trained.items():
        torch.testing.assert_close(value.detach(), torch.lerp(before[key], anchor[f"mean.{key}"], 0.1))
    once = {key: value.detach().clone() for key, value in loaded.trained.items()}
    with torch.no_grad():
        loaded.model.eval()(input_ids=torch.ones(1, 4, dtype=torch.int64))
    assert all(torch.equal(value, once[key]) for key, value in loaded.trained.items())


def test_a_penalty_is_lessened_by_optimisers_that_take_no_gradient_too(holding: Any) -> None:
    losses = {}
    for recipe in ("none", "ewc(strength=10.0)"):
        job = holding(recipe, training={"optimiser": "spsa-gc(draws=1)", "learning_rate": 1e-3})
        loaded = Loaded(job)
        anchor = tensors.load(Path(job.anchor)) if job.anchor else {}
        engine: Any = ENGINES["plain"](
            loaded.model, loaded.trained, job.task.training, job.engine, RANKS, anchor=anchor
        )
        losses[recipe] = engine.step(loaded.batches[0])
    assert losses["ewc(strength=10.0)"] > losses["none"]


def test_an_anchor_that_is_missing_strange_or_not_asked_for_is_refused(holding: Any, tmp_path: Path) -> None:
    job = holding("ewc")
    with pytest.raises(MismatchError, match="needs some tensors"):
        trained(replace(job, anchor=""), tmp_path)
    anchor = tensors.load(Path(job.anchor))
    name = next(iter(anchor))
    for fault, words in (({name: anchor[name][:1]}, "does not fit"), ({name: anchor[name] * float("nan")}, "finite")):
        tensors.save(tmp_path / "strange", anchor | fault)
        with pytest.raises(MismatchError, match=words):
            trained(replace(job, anchor=str(tmp_path / "strange")), tmp_path)
    tensors.save(tmp_path / "more", anchor | {"more": torch.zeros(1)})
    with pytest.raises(MismatchError, match="more was not asked for"):
        trained(replace(job, anchor=str(tmp_path / "more")), tmp_path)
    with pytest.raises(MismatchError, match="needs no tensors"):
        trained(replace(holding("none"), anchor=job.anchor), tmp_path)


def test_steps_that_surgery_takes_back_do_not_count_for_a_policy(holding: Any, tmp_path: Path) -> None:
    policy = {"min_steps": 8, "max_steps": 200}
    with pytest.raises(RefusedError, match="min_steps.*count as"):
        trained(holding("surgery(alpha=0.5)", training={"steps": 20}, policy=policy), tmp_path)
    trained(holding("surgery(alpha=0.05)", training={"steps": 20}, policy=policy), tmp_path)


def test_a_site_may_refuse_retentions_and_anchors_that_are_too_large(holding: Any) -> None:
    job = holding("ewc")
    policy = Policy(bases=("any",), data=(), methods=(job.task.method.name,), retentions=("none",), max_length=4096)
    task = replace(job.task, training=replace(job.task.training, max_length=32))
    with pytest.raises(RefusedError, match="retentions.*ewc is not among none"):
        policy.check_task(task)
    replace(policy, retentions=("none", "ewc")).check_task(task)
    with pytest.raises(RefusedError, match="max_bundle_mib.*held to, of 100 MiB"):
        replace(policy, retentions=("any",), max_bundle_mib=99.0).check_task(replace(task, anchor_size=100 << 20))
    with pytest.raises(ValueError, match="there is no 'ewx'"):
        replace(policy, retentions=("ewx",))


@pytest.mark.parametrize(
    ("recipe", "stage", "words"),
    [("ewc", 3, "spread it in stage 3"), ("surgery", 1, "copies of its own"), ("ewc", 2, ""), ("none", 3, "")],
)
def test_an_engine_says_what_it_cannot_hold(job: Any, recipe: str, stage: int, words: str) -> None:
    one = job(name="deepspeed", zero_stage=stage, training={"retention": recipe})
    if not words:
        ENGINES["deepspeed"].check(one.task.training, one.engine)
        return
    with pytest.raises(InputError, match=words):
        ENGINES["deepspeed"].check(one.task.training, one.engine)


@pytest.mark.slow(alone=True)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_penalty_is_the_same_where_deepspeed_trains(holding: Any, start: Any, tmp_path: Path, stage: int) -> None:
    expected = trained(holding("ewc(strength=100.0)"), tmp_path)
    job = holding("ewc(strength=100.0)", name="deepspeed", zero_stage=stage, processes=2, threads=2)
    list(start(job, tmp_path / "task").events())
    update = tensors.load(Path(job.out) / "update.safetensors")
    for key, value in update.items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=0)
