"""Which stages of an upload a run may ask for."""

from types import SimpleNamespace
from typing import Any

import pytest

from offsite.coordinator.runs import legality
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice, RunSpec

WHOLE = Choice(name="whole")
STAGES: dict[str, Any] = {
    "mask": SimpleNamespace(name="mask", hides=True, phases=("keys", "train", "unmask"), noise=0.0),
    "late": SimpleNamespace(name="late", hides=False, phases=("train", "after"), noise=0.0),
}


@pytest.mark.parametrize(
    ("strategy", "stage", "words"),
    [
        (
            "low-rank",
            "mask",
            "stage mask hides all but a sum, and strategy low-rank must see each update; use factor-mean",
        ),
        ("factor-mean", "mask", "stage mask hides all but a sum, and rounds unpack each update by itself so far"),
        ("low-rank", "late", "stage late works in the phases train, after, and a round has train alone so far"),
    ],
)
def test_a_stage_that_asks_more_of_a_round_than_it_does_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, strategy: str, stage: str, words: str
) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    monkeypatch.setattr(legality.upload, "make", lambda chain: [STAGES[choice.name] for choice in chain])
    spec = RunSpec(model="nowhere", strategy=Choice(name=strategy), upload=(Choice(name=stage),), builders=(WHOLE,))
    with pytest.raises(InputError, match=words):
        legality.judge(spec)


def test_a_stage_that_is_not_known_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    spec = RunSpec(model="nowhere", builders=(WHOLE,), upload=(Choice(name="nosie"),))
    with pytest.raises(InputError, match="upload: there is no stage 'nosie' .did you mean noise.*; known are noise"):
        legality.judge(spec)
