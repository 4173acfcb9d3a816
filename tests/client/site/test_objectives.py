"""A site that compares answers: with what, in which rounds, and in how many processes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client.site.handout import load, referred
from offsite.client.site.training import train
from offsite.emulator import bundle, methods
from offsite.emulator.modality import default, run
from offsite.protos import tensors
from offsite.protos.documents import from_json
from offsite.protos.errors import InputError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import UpdateMetrics

Jobs = Any
TWO = {"processes": 2, "threads": 2}
TRAINING = {"steps": 6, "batch_size": 5, "learning_rate": 1e-2}


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """A maker of files of rows of an objective."""

    def write(name: str) -> Path:
        drawn = torch.randint(60, (10, 12), generator=torch.Generator().manual_seed(3)).tolist()
        rows = []
        for at, row in enumerate(drawn):
            prompt, good, bad = (" ".join(f"w{n}" for n in part) for part in (row[:3], row[3 : 5 + at % 4], row[8:]))
            pair = {"prompt": prompt, "chosen": good, "rejected": bad}
            mark = {"prompt": prompt, "completion": good, "label": at % 2 == 0}
            rows.append(pair if name == "dpo" else mark)
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    return write


def trained(job: Any, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    told: list[float] = []

    def say(event: str, **fields: Any) -> None:
        if event == "step":
            told.append(fields["loss"])

    train(replace(job, out=str(folder)), say=say, rendezvous=folder / "rendezvous")
    return told, tensors.load(folder / "update.safetensors")


def test_answers_are_compared_with_the_emulator_as_it_was_before_the_first_round(
    job: Jobs, data: Any, tmp_path: Path
) -> None:
    one = job(data=data("dpo"), training=TRAINING | {"objective": "dpo(beta=1.0)"})
    losses, update = trained(one, tmp_path / "first")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    metrics = from_json(UpdateMetrics, (tmp_path / "first" / "metrics.json").read_bytes(), where="metrics")
    assert metrics.examples == 10 and metrics.loss == pytest.approx(sum(losses) / 6)
    again, same = trained(one, tmp_path / "again")
    assert again == losses and all(torch.equal(update[key], same[key]) for key in update)
    tensors.save(tmp_path / "adapter.safetensors", update)
    later = replace(one, adapter=str(tmp_path / "adapter.safetensors"), task=replace(one.task, round=1, rounds=2))
    losses, _ = trained(later, tmp_path / "later")
    assert losses[0] < math.log(2) - 1e-2, "what was learned counts against the same reference"


@pytest.mark.parametrize("method", ["lora(rank=4,alpha=8.0)", "spiel(share=0.05)"])
def test_the_reference_changes_nothing_and_what_was_handed_out_is_back_afterwards(
    job: Jobs, tmp_path: Path, method: str
) -> None:
    one, chosen = job(training={"objective": "dpo"}), parse_one(method)
    bare, _ = bundle.load(Path(one.bundle), layout=bundle.described(one.manifest), dtype=torch.float32)
    places = bundle.described(one.manifest).outline.places
    start = methods.make(chosen.name, chosen.settings).start(bare, places, seed=0)
    moving = {key: value + 0.1 if value.is_floating_point() else value for key, value in start.items()}
    tensors.save(tmp_path / "adapter.safetensors", moving)
    one = replace(
        one, adapter=str(tmp_path / "adapter.safetensors"), task=replace(one.task, method=chosen, round=1, rounds=2)
    )
    handout, batch = load(one), default().probe(bare, rows=2, length=8)
    with torch.no_grad():
        before, expected = run(handout.model, batch), run(bare, batch)
        with referred(handout, one) as reference:
            torch.testing.assert_close(run(reference, batch), expected)
        assert torch.equal(run(handout.model, batch), before) and not torch.allclose(before, expected, atol=1e-3)


def test_rows_for_another_objective_are_named_with_what_is_expected(job: Jobs, tmp_path: Path) -> None:
    one = job(training={"objective": "dpo"}, policy={"odd_rows": "refuse"})
    with pytest.raises(InputError, match="line 1: found the columns .*expected for the objective dpo") as error:
        trained(one, tmp_path)
    assert error.value.reason == "FAULT_DATA"


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_answers_in_packed_pieces_of_a_batch_compare_as_all_of_them_at_once(
    job: Jobs, data: Any, tmp_path: Path, objective: str
) -> None:
    file, training = data(objective), TRAINING | {"objective": f"{objective}(beta=1.0)"}
    losses, expected = trained(job(data=file, training=training), tmp_path / "whole")
    told, update = trained(job(data=file, training=training, micro_batch=3, packing=True), tmp_path / "pieces")
    assert told == pytest.approx(losses, abs=1e-5) and len(set(losses)) == len(losses)
    for key, value in update.items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("engine", [{"name": "plain"}, *({"name": "deepspeed", "zero_stage": at} for at in (2, 3))])
def test_two_processes_compare_as_one(
    start: Any, job: Jobs, data: Any, tmp_path: Path, objective: str, engine: dict[str, Any]
) -> None:
    file, training = data(objective), TRAINING | {"objective": f"{objective}(beta=1.0)"}
    losses, expected = trained(job(data=file, training=training), tmp_path / "one")
    two = replace(job(data=file, training=training, **engine, **TWO), out=str(tmp_path / "two"))
    told = [event["loss"] for event in start(two, tmp_path / "task").events() if event["event"] == "step"]
    assert told == pytest.approx(losses, abs=1e-4) and len(set(losses)) == len(losses)
    update, broadcast = tensors.load(tmp_path / "two" / "update.safetensors"), tensors.load(Path(two.adapter))
    for key, value in update.items():
        moved = float((expected[key] - broadcast[key]).norm())
        assert moved > 1e-3 and float((value - expected[key]).norm()) < 0.05 * moved, key
