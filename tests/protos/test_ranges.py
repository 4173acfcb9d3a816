"""Every number of every document has a range, every text and every list a length, and nothing beyond them is read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.client.site.policy import Policy
from offsite.coordinator.comparison.plan import Plan
from offsite.emulator import builders, methods, placements
from offsite.protos.documents import from_json, from_toml, parse
from offsite.protos.errors import InputError
from offsite.protos.spec import Manifest, RunSpec, Span, TaskSpec, TrainingSpec, UpdateMetrics

DOCUMENTS = [RunSpec, TaskSpec, Manifest, UpdateMetrics, Span, EngineSpec, TrainerJob, Policy, Plan]
FREE = ("settings",)  # plain data, bounded as a whole


def unbounded(schema: Any, place: str) -> Iterator[str]:
    """Yield the places of a JSON schema at which something has no end."""
    if not isinstance(schema, dict):
        return
    ends = {
        "integer": ("minimum", "maximum"),
        "number": ("maximum",),
        "string": ("maxLength",),
        "array": ("maxItems",),
        "object": ("maxProperties",),
    }.get(str(schema.get("type")), ())
    if not {"enum", "const", "properties"} & schema.keys() and not all(end in schema for end in ends):
        yield place
    for name, inner in schema.items():
        if name in FREE:
            continue
        for at, one in enumerate(inner) if isinstance(inner, list) else [("", inner)]:
            yield from unbounded(one, f"{place}/{name}{at}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_everything_in_a_document_has_an_end(document: Any) -> None:
    assert list(unbounded(TypeAdapter(document).json_schema(), document.__name__)) == []


BEYOND = [
    ("rounds", 2**32),
    ("rounds", True),
    ("rounds", 2.0),
    ("rounds", "2"),
    ("stall_s", float("inf")),
    ("stall_s", float("nan")),
    ("stall_s", 10**400),
    ("stall_s", True),
    ("merge", 1),
    ("merge", "yes"),
    ("name", "x" * 201),
    ("name", "red \x1b[31m"),
    ("name", "two\nlines"),
    ("name", "right to left \u202e"),
    ("name", "half \ud800"),
    ("model", "x" * 5000),
    ("model", "x\x00y"),
    ("sites", ["a"] * 2000),
    ("sites", "a"),
    ("evaluation", {f"set{n}": "x" for n in range(300)}),
    ("evaluation", {"../x": "x"}),
    ("training", {"seed": 2**63}),
    ("training", {"learning_rate": 1e308}),
    ("method", {"name": "lora", "settings": {"alpha": float("inf")}}),
    ("method", {"name": "lora", "settings": {"rank": 2**64}}),
    ("method", {"name": "lora", "settings": {str(n): 1 for n in range(100)}}),
    ("method", {"name": "lora", "settings": {"deep": json.loads("[" * 20 + "]" * 20)}}),
]


@pytest.mark.parametrize(("field", "value"), BEYOND, ids=range(len(BEYOND)))
def test_what_is_beyond_a_range_is_refused_in_a_short_sentence(field: str, value: Any) -> None:
    with pytest.raises(InputError) as refused:
        parse(RunSpec, {"model": "m", field: value}, where="run spec")
    told = str(refused.value)
    assert told.startswith("run spec: ") and len(told) < 500 and told.isprintable()


JSON = {
    "deep": b"[" * 100_000,
    "deep table": b'{"a":' * 100_000,
    "surrogate": rb'{"model": "\ud800"}',
    "digits": b'{"model": "m", "rounds": ' + b"9" * 5000 + b"}",
    "exponent": b'{"model": "m", "stall_s": 1e999}',
    "nan": b'{"model": "m", "stall_s": NaN}',
    "bytes": b"\xff\xfe",
    "nothing": b"",
    "null": b"null",
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_no_one_means_is_one_sentence(name: str) -> None:
    with pytest.raises(InputError) as refused:
        from_json(RunSpec, JSON[name], where="run spec")
    assert str(refused.value).startswith("run spec: ") and len(str(refused.value)) < 500


TOML = {
    "deep": b"a = " + b"[" * 100_000,
    "deep keys": b"a" + b".a" * 5000 + b" = 1",
    "digits": b"rounds = " + b"9" * 5000,
    "hexadecimal": b"rounds = 0x" + b"f" * 5000,
    "infinite": b'model = "m"\nstall_s = inf',
    "date": b'model = "m"\nname = 2020-01-01',
    "bytes": b'model = "\xff"',
    "large": b"#" * 2_000_000,
}


@pytest.mark.parametrize("name", TOML)
def test_toml_that_no_one_means_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(TOML[name])
    with pytest.raises(InputError) as refused:
        from_toml(RunSpec, tmp_path / "run.toml")
    assert "run.toml: " in str(refused.value) and len(str(refused.value)) < 500


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b'\xef\xbb\xbfmodel = "data"')
    assert from_toml(RunSpec, tmp_path / "run.toml").model == "data"


def test_a_whole_number_stands_for_a_float() -> None:
    assert parse(TrainingSpec, {"learning_rate": 1}, where="x").learning_rate == 1.0


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (2.0, 1.0), (0.0, 1e300)])
def test_a_span_is_neither_negative_nor_endless(ends: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="span: "):
        parse(Span, {"kind": "training", "start": ends[0], "end": ends[1]}, where="span")


@pytest.mark.parametrize("value", [True, 2.0, "8", float("inf"), [8], None])
def test_a_plug_ins_settings_are_taken_strictly(value: Any) -> None:
    with pytest.raises(ValueError, match="method 'lora': "):
        methods.make("lora", {"rank": value})


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(ValueError, match="no builder 'chrash' .did you mean crash"):
        builders.make("chrash", {})
    with pytest.raises(ValueError, match="no setting 'botom' .did you mean bottom"):
        placements.make("ends", {"botom": 1})
