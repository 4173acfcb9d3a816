"""A learning rate that is found when a run is built, by how fast it adapts the emulator."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.node import Node
from offsite.coordinator.runs import legality
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.building import build
from offsite.coordinator.runs.steps.orders import Build
from offsite.protos.errors import InputError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Choice, RunSpec, TrainingSpec


@pytest.mark.slow
def test_a_rate_is_found_in_the_build_and_the_same_one_each_time(material: Path, tmp_path: Path) -> None:
    node = Node(tmp_path / "node", f"file://{tmp_path}/blobs").prepare()
    run = Grant(
        model=str(material / "model"),
        builders=(Choice(name="uniform", settings={"keep": 3}),),
        trainable=parse_one("ends(bottom=1, top=1)"),
        method=parse_one("lora(rank=2)"),
        public=str(material / "public.jsonl"),
        training=TrainingSpec(max_length=16),
        speed=0.001,
    )
    rate, again, faster = (
        build(node, one, Build(sites=("bank",))).learning_rate for one in (run, run, replace(run, speed=0.004))
    )
    assert rate == again < faster
    with pytest.raises(InputError, match="speed: no learning rate moves the emulator's predictions by 1000 nats"):
        build(node, replace(run, speed=1000.0), Build(sites=("bank",)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a trial trains on public text: give some as public"),
        ({"training": TrainingSpec(learning_rate=1e-3)}, "training.learning_rate is one; give one of both"),
        ({"training": TrainingSpec(optimiser=Choice(name="natural-galore"))}, "the trial is by adamw; use that"),
        ({"method": Choice(name="signature"), "strategy": Choice(name="sum")}, "signature measures, and nothing of it"),
    ],
)
def test_a_speed_without_a_trial_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    with pytest.raises(InputError, match=words):
        legality.judge(RunSpec(model="nowhere", builders=(Choice(name="whole"),), speed=0.05, **changes))
