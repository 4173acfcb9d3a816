"""Retentions at a site: they do what they say in its steps, in engines that take them, and nothing at strength 0."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

from offsite.client.site import reservoir, rows
from offsite.client.site.engines import ENGINES, Ranks
from offsite.client.site.handout import load
from offsite.client.site.job import TrainerJob
from offsite.client.site.policy import Policy
from offsite.client.site.training import train
from offsite.emulator import bundle, methods, modality, objectives, retention
from offsite.emulator.modality import collate
from offsite.emulator.retention.objective import objective_of
from offsite.emulator.retention.recall import coarse
from offsite.kernels.schema import Rule, Schema
from offsite.protos import tensors
from offsite.protos.errors import ConflictError, InputError, MismatchError, RefusedError
from offsite.protos.spec import Ancestor, Choice

from .ranks import Loaded

RANKS = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def holding(job: Any, site_files: Path, tmp_path: Path) -> Any:
    """A maker of jobs whose training is held to an adapter that is not the broadcast."""
    broadcast = tensors.load(site_files / "adapter.safetensors")

    def make(recipe: str, *, apart: float = 0.05, **more: Any) -> TrainerJob:
        more["policy"] = {"replay_rows": 64} | more.pop("policy", {})
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


@pytest.mark.parametrize(
    "recipe", ["ewc(strength=0.0)", "orthogonal(strength=0.0)", "surgery(alpha=0.0)", "distil(strength=0.0)", "replay"]
)
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


@pytest.mark.parametrize("recipe", ["ewc(strength=1e3)", "distil(strength=5.0)"])
def test_a_penalty_counts_once_and_what_is_recalled_goes_with_its_rows_in_packed_pieces(
    holding: Any, recipe: str, tmp_path: Path
) -> None:
    whole = trained(holding(recipe), tmp_path)
    pieces = trained(holding(recipe, micro_batch=2, packing=True), tmp_path)
    for key, value in pieces.items():
        torch.testing.assert_close(value, whole[key], atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("k", [3, 4096])
def test_predictions_are_held_to_those_of_the_version_before(holding: Any, tmp_path: Path, k: int) -> None:
    divergences = {}
    for recipe in ("none", f"distil(strength=20.0,temperature=1.0,k={k})"):
        update = trained(holding(recipe, training={"steps": 8}), tmp_path)
        job = holding(f"distil(k={k},temperature=1.0)")
        loaded, anchor = Loaded(job), tensors.load(Path(job.anchor))
        objective: Any = objective_of(job.task.training)
        keeps: Any = retention.make("distil", {})
        live = loaded.trained
        fill(live, keeps.reference(anchor))
        samples = objective.refer(loaded.model.eval(), loaded.encoded[:4], batch_size=2)
        batch, plain = objective.collate(samples), objectives.make("supervised", {})
        losses = []
        for values in (keeps.reference(anchor), update):
            fill(live, values)
            with torch.no_grad():
                own = plain.loss(loaded.model, plain.collate(loaded.encoded[:4]))
                losses.append(float(objective.loss(loaded.model, batch) - own))
        assert abs(losses[0]) < 1e-5, "nothing at the version itself"
        divergences[recipe] = losses[1]
    plain_one, held_one = divergences.values()
    assert 0 < held_one < 0.9 * plain_one


def test_a_divergence_over_few_tokens_is_a_bound_and_over_all_of_them_exact(holding: Any) -> None:
    job, values = holding("distil"), {}
    loaded = Loaded(job)
    batch = collate(loaded.encoded[:3])
    with torch.no_grad():
        logits = modality.predictions(loaded.model.eval(), batch)
        assert len(logits) == batch.targets
        other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    exact = kl_div(other.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
    for k in (2, 16, logits.shape[1]):
        tokens = logits.topk(k, dim=1).indices
        pair = coarse(other, tokens), coarse(logits, tokens)
        values[k] = float(kl_div(*pair, reduction="batchmean", log_target=True))
    assert 0 < values[2] < values[16] < values[logits.shape[1]] == pytest.approx(float(exact), rel=1e-5)


def fill(live: Any, values: Any) -> None:
    with torch.no_grad():
        for key, parameter in live.items():
            parameter.copy_(values[key])


def test_rows_of_earlier_tasks_fill_their_share_of_each_batch_and_never_leave(job: Any, tmp_path: Path) -> None:
    one = job(training={"retention": "replay(rows=5,share=0.5)", "batch_size": 4}, policy={"replay_rows": 5})
    first = trained(one, tmp_path)
    plain = trained(job(training={"batch_size": 4}), tmp_path)
    assert all(torch.equal(first[key], plain[key]) for key in first), "of the first task nothing is kept yet"
    file, out = tmp_path / "first.jsonl", Path(one.out)
    trained(one, tmp_path)
    (out / "reservoir.jsonl").replace(file)
    kept = list(reservoir.rows(file))
    assert len(kept) == 5 and file.stat().st_mode & 0o077 == 0
    texts = {" ".join(map(str, row.values())) for row in kept}
    new = (json.dumps({"text": f"w{n} w5 w6 w7 w{n + 1} w9"}) for n in range(3, 19))
    (tmp_path / "new.jsonl").write_text("\n".join(new))
    later = replace(one, data=str(tmp_path / "new.jsonl"), reservoirs=(str(file),))
    later = replace(later, task=replace(later.task, run="run-2", continues=Ancestor(run="run-1", round=1, rounds=1)))
    handout = load(later)
    scheduled = rows.schedule_rows(later, rows.read(later), handout.tokenizer)
    assert (scheduled.old, scheduled.kept) == (2, 5) and scheduled.distinct == 16
    assert all(sum(row >= scheduled.own for row in step) == 2 and len(step) == 4 for step in scheduled.order)
    update = trained(later, tmp_path)
    again = trained(later, tmp_path)
    assert all(torch.equal(update[key], again[key]) for key in update)
    sent = b"".join((out / name).read_bytes() for name in ("update.safetensors", "metrics.json", "update.digest"))
    assert texts and not any(text.encode() in sent for text in texts)
    assert json.loads((out / "reservoir.jsonl").read_text().splitlines()[0]) == {"before": "run-1"}
    task = replace(later.task, training=replace(later.task.training, retention=Choice(name="none")))
    trained(replace(later, task=task), tmp_path)
    assert (out / "reservoir.jsonl").read_text() == '{"before": "run-1"}\n', "so the task after it knows of the first"


def test_rows_that_were_kept_are_not_seen_too_often(job: Any, tmp_path: Path) -> None:
    one = job(
        training={"retention": "replay(rows=2,share=0.25)", "steps": 20}, policy={"replay_rows": 2, "max_passes": 9}
    )
    reservoir.write(tmp_path / "kept.jsonl", [{"text": "w4 w5 w6"}, {"text": "w7 w8 w9"}], before="")
    with pytest.raises(RefusedError, match="max_passes.*10 passes over 2 sequences that were kept"):
        trained(replace(one, reservoirs=(str(tmp_path / "kept.jsonl"),)), tmp_path)


def test_a_site_keeps_no_rows_unless_its_policy_says_how_many(job: Any) -> None:
    task = job(training={"retention": "replay(rows=64)"}).task
    policy = Policy(bases=("any",), data=(), methods=(task.method.name,), min_length=1)
    with pytest.raises(RefusedError, match="replay_rows.*64 rows of a run to keep, at most 0 allowed"):
        policy.check_task(task)
    replace(policy, replay_rows=64).check_task(task)


def test_what_was_kept_is_found_along_the_runs_and_damage_is_said(tmp_path: Path) -> None:
    for name, before in (("a", ""), ("b", "a"), ("c", "b")):
        reservoir.write(tmp_path / f"{name}.jsonl", [{"text": name}], before=before)
    assert [file.stem for file in reservoir.chain(tmp_path, "c")] == ["a", "b", "c"]
    assert reservoir.chain(tmp_path, "d") == []
    (tmp_path / "b.jsonl").unlink()
    assert [file.stem for file in reservoir.chain(tmp_path, "c")] == ["c"]
    (tmp_path / "c.jsonl").write_text("half a li")
    with pytest.raises(ConflictError, match="not the rows that were kept"):
        list(reservoir.rows(tmp_path / "c.jsonl"))


def texts(file: Path, step: int) -> Path:
    """Write rows of a language of its own: each word is so many after the one before."""
    lines = [" ".join(f"w{3 + (row + step * at) % 40}" for at in range(12)) for row in range(24)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@pytest.mark.slow
def test_each_retention_forgets_less_of_a_first_task_than_training_without(job: Any, tmp_path: Path) -> None:
    first, second = texts(tmp_path / "first.jsonl", 1), texts(tmp_path / "second.jsonl", 3)
    training, lax = {"steps": 60, "learning_rate": 2e-2, "batch_size": 8}, {"replay_rows": 24}
    before = trained(job(training=training | {"retention": "replay(rows=24)"}, data=first, policy=lax), tmp_path)
    (tmp_path / "out" / "reservoir.jsonl").replace(tmp_path / "kept.jsonl")
    tensors.save(tmp_path / "before.safetensors", before)
    loaded = Loaded(job(training=training, data=first))
    of = loaded.job.task.method
    fisher: Any = methods.make("fisher", {"method": of.name, "settings": of.settings})
    bare = fresh(loaded.job)
    model = fisher.attach(bare, loaded.places, fisher.begin(bare, loaded.places, before, seed=0))
    for batch in loaded.batches[:3]:
        fisher.measure(model, loaded.places, batch)
    _, information = fisher.apart(fisher.state(model, loaded.places), {})
    schema = fisher.of.schema(before)

    def loss(values: Any, data: Path) -> float:
        one = Loaded(job(training=training, data=data))
        fill(one.trained, values)
        return modality.score(one.model.eval(), one.batches[:3]).mean

    def task(recipe: str) -> tuple[float, float]:
        one = replace(
            job(training=training | {"retention": recipe}, data=second, policy=lax),
            adapter=str(tmp_path / "before.safetensors"),
            reservoirs=(str(tmp_path / "kept.jsonl"),) * recipe.startswith("replay"),
        )
        one = replace(one, task=replace(one.task, continues=Ancestor(run="first", round=1, rounds=1)))
        choice = one.task.training.retention
        held: Any = retention.make(choice.name, choice.settings)
        if anchor := held.anchor(before, schema, held.remember(before, schema, {"fisher": information})):
            tensors.save(tmp_path / "anchor", anchor)
            one = replace(one, anchor=str(tmp_path / "anchor"))
        update = trained(one, tmp_path)
        return loss(update, first), loss(update, second)

    start = loss(tensors.load(Path(loaded.job.adapter)), first)
    learned, (forgotten, new) = loss(before, first), task("none")
    assert learned < start and learned + 0.1 < forgotten
    report = {"none": (forgotten, new)}
    recipes = ("ewc(strength=5e3)", "orthogonal(strength=30.0)", "surgery(alpha=0.2)", "distil(strength=10.0)")
    for recipe in (*recipes, "replay(rows=24,share=0.5)"):
        report[recipe] = task(recipe)
    kept = {recipe for recipe, (old, _) in report.items() if old < forgotten - 0.01}
    assert kept == {*recipes, "replay(rows=24,share=0.5)"}, report


def fresh(one: TrainerJob) -> Any:
    """The emulator without an adapter."""
    return bundle.load(Path(one.bundle), layout=bundle.described(one.manifest), dtype=torch.float32)[0]


@pytest.mark.slow(alone=True)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_penalty_is_the_same_where_deepspeed_trains(holding: Any, start: Any, tmp_path: Path, stage: int) -> None:
    expected = trained(holding("ewc(strength=100.0)"), tmp_path)
    job = holding("ewc(strength=100.0)", name="deepspeed", zero_stage=stage, processes=2, threads=2)
    list(start(job, tmp_path / "task").events())
    update = tensors.load(Path(job.out) / "update.safetensors")
    for key, value in update.items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=0)


def test_a_row_that_is_kept_may_hold_any_character(tmp_path: Path) -> None:
    rows = [{"text": f"a\u2028b \x85 c\r\n\x1c {number}"} for number in range(2)]
    reservoir.write(tmp_path / "kept.jsonl", rows, before="")
    assert list(reservoir.rows(tmp_path / "kept.jsonl")) == rows
