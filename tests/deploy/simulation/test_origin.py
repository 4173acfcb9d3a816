"""A simulation that goes on from another one: the bytes of one of all rounds, and what a task leaves for the next."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offsite.client import Choice, RunSpec, TrainingSpec
from offsite.client.site.policy import Policy
from offsite.deploy import simulate
from offsite.deploy.simulation import visit
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import UpdateMetrics

from .conftest import Do

MEAN = parse_one("factor-mean")
TRAINING: dict[str, Any] = {"steps": 4, "learning_rate": 0.005, "max_length": 32, "seed": 3}


def ends(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow(alone=True)
def test_rounds_in_one_simulation_and_in_some_that_go_on_from_each_other_give_the_same_bytes(
    do: Do, material: Path
) -> None:
    exam = {"one": str(material / "held-out.jsonl")}
    whole = do("whole", rounds=3, sites=2)
    first = do("first", sites=2, task="one", evaluation=exam)
    do("second", start="first", sites=2)
    third = do("third", start="second", sites=2, evaluation=exam)
    assert "Earlier tasks" in (third.out / "report.html").read_text()
    assert ends(first.out) != ends(whole.out) == ends(third.out)
    assert third.report["continues"] == {"run": "simulation-2", "round": 1, "rounds": 2}
    again = do("third", start="second", sites=2, evaluation=exam)
    assert again.report == third.report, "it is over, and known"
    with pytest.raises(ConflictError, match="holds another simulation"):
        do("third", start="first", sites=2)


@pytest.mark.slow
def test_what_was_measured_on_a_task_holds_the_virtual_sites_of_the_next(do: Do) -> None:
    lora: dict[str, Any] = {"rank": 2, "alpha": 4.0, "modules": ["q_proj"]}
    fisher = Choice(name="fisher", settings={"settings": lora})
    before = do("first", strategy=MEAN, sites=2)
    lax = Policy(bases=("any",), data=("/",), methods=("fisher",), max_passes=1e9, min_rows=1)
    do("fisher", start="first", method=fisher, strategy=parse_one("sum"), sites=2, policy=lax)
    after: dict[str, dict[str, torch.Tensor]] = {}
    for retention in ("none", "ewc(strength=0)", "ewc(strength=1e9)"):
        training = TrainingSpec(**TRAINING, retention=parse_one(retention))
        done = do(retention, start="fisher", strategy=MEAN, training=training, sites=2, seed=1)
        after[retention] = load_file(done.adapter / "adapter_model.safetensors")
    free, weightless, bound = after.values()
    start = load_file(before.adapter / "adapter_model.safetensors")
    assert all(torch.equal(weightless[key], free[key]) for key in free)
    assert distance(bound, start) < 0.9 * distance(free, start)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(one[key] - other[key]).flatten() for key in one]).norm())


def still(one: visit.Visit) -> Any:
    """Train nothing."""
    return dict(one.broadcast), UpdateMetrics(examples=16, tokens=100, loss=2.0, engine="none")


def test_a_simulation_that_cannot_go_on_is_refused(do: Do, tmp_path: Path) -> None:
    do("first", train=f"{__name__}:still", sites=2)
    (tmp_path / "empty").mkdir()
    for changes, why in (
        ({"start": "empty"}, "empty is not the folder of a simulation"),
        ({"start": "first", "method": parse_one("lora(rank=4)")}, "a run goes on with the same"),
        ({"start": "first", "training": TrainingSpec(retention=parse_one("replay"))}, "virtual ones keep none"),
        ({"start": "first", "training": TrainingSpec(retention=parse_one("ewc"))}, "strategy low-rank writes|fisher"),
    ):
        with pytest.raises(InputError, match=why):
            do("refused", **changes)
        assert not (tmp_path / "refused").exists()
    with pytest.raises(InputError, match=r"start: run abcd is a coordinator's, .* give that one's folder .--start DIR"):
        simulate(RunSpec(model="m", start="abcd"), data=tmp_path, out=tmp_path / "refused")
