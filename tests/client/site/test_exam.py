"""A site's own exam: which rows it is of, that they never train, and the sums of them that leave."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client.site import exam, rows
from offsite.client.site.exam import CLIP, HeldOut, Paper
from offsite.client.site.handout import load
from offsite.client.site.job import TrainerJob
from offsite.client.site.policy import Policy
from offsite.client.site.training import train
from offsite.emulator import modality
from offsite.emulator.modality import Score
from offsite.protos import tensors
from offsite.protos.documents import from_json
from offsite.protos.exams import nats, total
from offsite.protos.spec import UpdateMetrics

FOUR = {"held_out": 4, "min_held_out": 2}
SECRET = bytes(range(32))


@pytest.fixture
def asked(job: Any) -> Any:
    """A maker of jobs that ask for an exam, of four rows unless the policy says otherwise."""

    def make(*, exam: bool = True, policy: dict[str, Any] | None = None, steps: int = 2, **more: Any) -> TrainerJob:
        one: TrainerJob = job(policy=FOUR | (policy or {}), training={"steps": steps}, **more)
        return replace(one, task=replace(one.task, exam=exam))

    return make


def trained(job: TrainerJob, folder: Path) -> tuple[dict[str, torch.Tensor], UpdateMetrics, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    said: list[dict[str, Any]] = []
    job = replace(job, out=str(folder))
    train(job, say=lambda event, **fields: said.append({"event": event, **fields}), rendezvous=folder / "rendezvous")
    metrics = from_json(UpdateMetrics, (folder / "metrics.json").read_bytes(), where="metrics")
    return tensors.load(folder / "update.safetensors"), metrics, said


def parted(job: TrainerJob) -> tuple[list[Any], list[Any]]:
    data, held_out = rows.hold_out(job, rows.read(job), secret=SECRET)
    return data.examples, list(held_out.examples)


def test_a_site_trains_as_if_its_held_out_rows_were_not_there(asked: Any, tmp_path: Path) -> None:
    one = asked()
    learned, held_out = parted(one)
    assert len(held_out) == 4 and len(learned) == 18
    rest = tmp_path / "rest.jsonl"
    rest.write_text("\n".join(json.dumps(example.row) for example in learned))
    update, metrics, _ = trained(one, tmp_path / "one")
    other, plain, _ = trained(asked(data=rest, policy={"held_out": 0}), tmp_path / "other")
    unasked, without, _ = trained(asked(exam=False), tmp_path / "unasked")
    assert all(torch.equal(update[key], other[key]) and torch.equal(update[key], unasked[key]) for key in update)
    assert (metrics.loss, metrics.tokens, metrics.examples) == (plain.loss, plain.tokens, plain.examples)
    assert metrics.exam is not None and plain.exam is None and without.exam is None


def test_what_leaves_is_the_sum_over_all_tokens_before_and_after(asked: Any, tmp_path: Path) -> None:
    one = asked()
    _, held_out = parted(one)
    update, metrics, said = trained(one, tmp_path / "one")
    handout = load(one)
    sheet = exam.paper(one, HeldOut(held_out, SECRET), handout.tokenizer)
    together = modality.collate([sample for batch in sheet.rows for sample in batch.samples])

    def pooled(adapter: dict[str, torch.Tensor]) -> Score:
        live = handout.method.named_parameters(handout.model, handout.places)
        with torch.no_grad():
            for key, parameter in live.items():
                parameter.copy_(adapter[key])
        return modality.score(handout.model, [together])

    told, (event,) = metrics.exam, [one for one in said if one["event"] == "exam"]
    assert told is not None and told.after is not None and (told.rows, told.noised) == (4, False)
    for part, adapter in ((told.before, handout.broadcast), (told.after, update)):
        whole = pooled(adapter)
        assert part.tokens == whole.count and part.nll == pytest.approx(whole.total, rel=1e-5)
    assert told.after.nll < told.before.nll
    assert event["before"] == pytest.approx(math.exp(nats(told.before) or 0.0)) and event["leaves"] is True


def test_no_held_out_row_is_in_any_batch(asked: Any) -> None:
    one = asked(steps=40)
    data, held_out = rows.hold_out(one, rows.read(one), secret=SECRET)
    tokenizer = load(one).tokenizer
    schedule = rows.schedule_rows(one, data, tokenizer)
    seen = {sample for batch in schedule.texts() for sample in batch.samples}
    examined = {sample for batch in exam.paper(one, held_out, tokenizer).rows for sample in batch.samples}
    assert len(seen) == 18 and len(examined) == 4 and not seen & examined


def test_where_a_row_goes_is_a_function_of_the_secret_and_the_row(asked: Any, tmp_path: Path) -> None:
    def sides(lines: list[str], secret: bytes = SECRET) -> tuple[set[str], set[str]]:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(lines))
        one = asked(data=file)
        data, held_out = rows.hold_out(one, rows.read(one), secret=secret)
        return {*map(repr, data.examples)}, {*map(repr, held_out.examples)}

    lines = Path(asked().data).read_text().splitlines()
    learned, held_out = sides(lines)
    assert not learned & held_out and len(held_out) == 4
    assert sides(random.Random(1).sample(lines, len(lines))) == (learned, held_out)
    assert sides([*lines, *lines[:7]]) == (learned, held_out), "a row that is there twice is on one side"
    more = [json.dumps({"prompt": f"w{n} w{n + 1} w{n} w7", "completion": f"w{n}"}) for n in range(50)]
    later, exam = sides([*lines, *more])
    assert learned <= later and len(exam) == 4, "no row that was trained on is held out later"
    assert sides(lines, secret=bytes(32))[1] != held_out


def test_the_policy_says_what_leaves(asked: Any, tmp_path: Path) -> None:
    for name, policy in (("few", {"min_held_out": 5}), ("withheld", {"figures": "withhold"})):
        _, metrics, said = trained(asked(policy=policy, steps=1), tmp_path / name)
        assert metrics.exam is None
        assert [one["leaves"] for one in said if one["event"] == "exam"] == [False], "the site's own log has it"
    _, metrics, said = trained(asked(policy={"held_out": 5}, steps=1), tmp_path / "too few rows")
    assert metrics.exam is None and not [one for one in said if one["event"] == "exam"]


def marks(*means: float) -> list[Score]:
    return [Score(3 * mean, 3) for mean in means]


def test_noise_is_laplaces_of_the_size_that_one_row_can_make_and_the_same_for_the_same_sum() -> None:
    policy = Policy(bases=("any",), data=(), figures="noise", figure_epsilon=2.0, min_held_out=1)
    drawn = []
    for number in range(400):
        paper = Paper([None] * 3, policy, number.to_bytes(32, "big"))  # type: ignore[list-item]
        told, again = (paper.exam(marks(1.0, 4.0, 1e9), None) for _ in range(2))
        assert told is not None and told == again and told.noised and told.before.tokens == 3
        assert told.before.nll is not None
        drawn.append(told.before.nll - (1.0 + 4.0 + CLIP))
    scale = CLIP / 2.0
    assert sum(drawn) / 400 == pytest.approx(0.0, abs=4 * scale * math.sqrt(2 / 400))
    assert sum(map(abs, drawn)) / 400 == pytest.approx(scale, rel=0.2)
    one = Paper([None] * 3, policy, bytes(32))  # type: ignore[list-item]
    assert one.exam(marks(1.0, 4.0, CLIP), None) == one.exam(marks(1.0, 4.0, math.inf), None)


def test_the_sums_of_sites_are_those_of_all_rows_together() -> None:
    sites = [marks(1.0, 2.5), marks(4.0), marks(0.25, 8.0, 3.0)]
    pooled = exam.plain_sum([mark for site in sites for mark in site])
    assert total(map(exam.plain_sum, sites)) == pooled
    assert total([pooled, exam.plain_sum([Score(math.inf, 2)])]).nll is None


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_that_spreads_the_model_measures_the_same(start: Any, asked: Any, tmp_path: Path, stage: int) -> None:
    _, plain, _ = trained(asked(), tmp_path / "plain")
    one = replace(asked(name="deepspeed", zero_stage=stage, processes=2, threads=1), out=str(tmp_path / "spread"))
    list(start(one, tmp_path / "task").events())
    spread = from_json(UpdateMetrics, (tmp_path / "spread" / "metrics.json").read_bytes(), where="metrics")
    assert plain.exam and spread.exam and plain.exam.after and spread.exam.after
    assert spread.exam.before.nll == pytest.approx(plain.exam.before.nll, rel=1e-5)
    assert spread.exam.after.nll == pytest.approx(plain.exam.after.nll, rel=1e-4)
