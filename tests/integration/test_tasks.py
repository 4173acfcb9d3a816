"""Tasks one after the other, over real processes: what a run leaves for the next one holds its sites."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offsite.client import Choice
from offsite.emulator.routing.tasks import Tasks
from offsite.protos.errors import InputError
from offsite.protos.recipes import parse_one

POLICY = 'bases = ["any"]\nmethods = ["lora", "fisher", "signature"]\nreplay_rows = 16\n'
TASKS = ("hospital", "bank")
RETENTIONS = ("none", "ewc(strength=0)", "ewc(strength=1e6)", "replay(rows=8)")


@pytest.mark.slow(alone=True)
def test_what_a_task_left_holds_the_sites_of_the_next_though_their_agents_have_gone_between(
    federation: Any, tmp_path: Path
) -> None:
    federation.coordinate()
    federation.join("ward", data=federation.material / "hospital.jsonl", policy=POLICY)
    task = federation.spec(sites=("ward",), strategy=Choice(name="factor-mean"))
    fisher = Choice(name="fisher", settings={"settings": task.method.settings})
    work = federation.folder / "work" / "ward"

    def held(retention: str) -> Any:
        return replace(task, training=replace(task.training, retention=parse_one(retention)))

    with federation.connect() as session:
        first = session.submit(held("replay(rows=8)"))
        before = values(first.result(tmp_path / "first"))
        measured = session.submit(replace(task, method=fisher, strategy=Choice(name="sum")), start=first)
        measured.wait()
        assert not list(work.glob("anchors/*"))

        federation.kill("ward")
        federation.join("ward", data=federation.material / "bank.jsonl", policy=POLICY)
        runs = [session.submit(held(retention), start=measured) for retention in RETENTIONS]
        free, weightless, bound, rehearsed = (values(run.result(tmp_path / run.id)) for run in runs)

    anchor = load_file(next(work.glob("anchors/*")))
    assert {key.partition(".")[0] for key in anchor} == {"before", "fisher"}
    for key, value in before.items():
        assert torch.equal(anchor[f"before.{key}"], value) and anchor[f"fisher.{key}"].shape == value.shape
        assert torch.equal(weightless[key], free[key])
    assert distance(bound, before) < 0.9 * distance(free, before)
    assert distance(rehearsed, free) > 0, "rows of the first task are among its own, or it would be the same"


@pytest.mark.slow(alone=True)
def test_tasks_are_known_by_what_their_sites_have_counted(federation: Any, tmp_path: Path) -> None:
    federation.coordinate()
    last = None
    with federation.connect() as session:
        for name in TASKS:
            federation.join(name, data=federation.material / f"{name}.jsonl", policy=POLICY)
            task = federation.spec(sites=(name,))
            counted = session.submit(replace(task, method=Choice(name="signature"), strategy=Choice(name="sum")))
            counted.wait()
            learning = replace(task, memory=Choice(name="grown"), task=name, known_by=counted.id)
            last = session.submit(learning, start=last) if last else session.submit(learning)
            last.wait()
        with pytest.raises(InputError, match=f"known_by: run {last.id} is of the method lora, .* a run of signature"):
            session.submit(replace(learning, known_by=last.id), start=last)
        folder = last.result(tmp_path / "out")
    tasks = Tasks.load(folder)
    assert tasks.sums.keys() == {*TASKS}
    assert all(float(one["0.signature.count"]) > 0 for one in tasks.sums.values())


def values(folder: Path) -> dict[str, torch.Tensor]:
    """A run's adapter, by the keys that sites know."""
    prefix, factors = "base_model.model.model.layers.", {".lora_A.weight": ".A", ".lora_B.weight": ".B"}
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    ends = {name: next(end for end in factors if name.endswith(end)) for name in tensors}
    return {name.removeprefix(prefix).removesuffix(end) + factors[end]: tensors[name] for name, end in ends.items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How far two adapters are from each other."""
    return float(torch.cat([(one[key] - other[key]).flatten() for key in one]).norm())
