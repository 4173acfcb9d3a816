"""Documents: equal ones have equal bytes, wrong ones are named by field."""

from pathlib import Path

import pytest

from offsite.protos.documents import canonical, from_json, from_toml, parse, to_json
from offsite.protos.errors import KINDS, InputError, MismatchError, OffsiteError, from_status
from offsite.protos.spec import Choice, LocalTraining, RunSpec, TrainingSpec
from offsite.protos.timeline import covered, seconds


def test_a_document_survives_the_wire() -> None:
    spec = RunSpec(model="m", rounds=3, sites=("a", "b"), method=Choice(name="lora", settings={"rank": 4}))
    assert from_json(RunSpec, to_json(spec), where="run spec") == spec


def test_training_that_names_no_schedule_has_the_constant_one() -> None:
    old = {"steps": 8, "warmup_steps": 2, "learning_rate": 1e-3}
    assert parse(LocalTraining, old, where="x").schedule == Choice(name="constant")
    written = parse(TrainingSpec, {"schedule": "cosine_with_min_lr(floor=0.05)"}, where="x").schedule
    assert written == Choice(name="cosine_with_min_lr", settings={"floor": 0.05})


def test_equal_documents_have_equal_bytes() -> None:
    first = parse(RunSpec, {"model": "m", "rounds": 2}, where="x")
    second = parse(RunSpec, {"rounds": 2, "model": "m"}, where="x")
    assert to_json(first) == to_json(second)
    assert to_json(first) != to_json(RunSpec(model="m", rounds=3))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "run spec: model: is missing, and has no default"),
        ({"model": "m", "rounds": 0}, "run spec: rounds: .* greater than or equal to 1 .got 0."),
        ({"model": "m", "epochs": 1}, "run spec: epochs: there is no such field; expected one of model, name"),
        ({"model": "m", "training": {"steps": "many"}}, "run spec: training.steps: .*integer"),
        ({"model": "m", "sites": ["../a"]}, "run spec: sites.0: expected a name of at most 64 letters"),
    ],
)
def test_a_wrong_field_is_named(value: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(RunSpec, value, where="run spec")


def test_what_is_not_json_or_toml_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="spec: not JSON"):
        from_json(RunSpec, b"{", where="spec")
    (tmp_path / "bad.toml").write_text("= 1")
    with pytest.raises(InputError, match="bad.toml: not TOML"):
        from_toml(TrainingSpec, tmp_path / "bad.toml")
    with pytest.raises(InputError, match="none.toml: cannot be read: No such file"):
        from_toml(TrainingSpec, tmp_path / "none.toml")


def test_numbers_that_are_not_finite_cannot_be_signed() -> None:
    with pytest.raises(ValueError):
        canonical({"loss": float("nan")})


def test_every_error_keeps_its_kind_across_the_wire() -> None:
    for kind in KINDS:
        assert type(from_status(kind.status, "words")) is kind
    assert type(from_status("INTERNAL", "words")) is OffsiteError
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes) and not {0, 1, 2, 130} & set(codes)
    assert str(from_status("DATA_LOSS", "words")) == "words" and MismatchError.exit_code == 7


def test_time_is_not_counted_twice() -> None:
    spans = [
        {"kind": "training", "start": 0.0, "end": 4.0},
        {"kind": "training", "start": 2.0, "end": 6.0},
        {"kind": "training", "start": 3.0, "end": 3.5},
        {"kind": "evaluation", "start": 5.0, "end": 8.0},
        {"kind": "aggregation", "start": 8.0, "end": 9.0},
    ]
    assert covered(spans, ["training"]) == 6.0 and covered(spans, ["training", "evaluation"]) == 8.0
    split = seconds(spans, start=0.0, end=10.0)
    assert split["total"] == 10.0 and split["overhead"] == 2.0 and split["aggregation"] == 1.0
