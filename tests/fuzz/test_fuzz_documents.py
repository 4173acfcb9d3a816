"""Documents, settings files, `--set` and recipes: whatever they hold, they are read or refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite.client.site.job import EngineSpec
from offsite.client.site.policy import Policy
from offsite.emulator import builders, methods, objectives, optimisers, parts, placements, schedules
from offsite.protos import addresses, recipes
from offsite.protos.assignments import assign
from offsite.protos.documents import from_json, from_toml, parse, to_json, to_plain
from offsite.protos.errors import InputError
from offsite.protos.spec import BaseRef, Choice, FileEntry, Manifest, RunSpec, Span, TaskSpec, UpdateMetrics

from .hostile import as_json, changed, deep, scalars, texts, told, values

DIGEST = "sha256:" + "0" * 64
MANIFEST = Manifest(
    base=BaseRef(name="m", digest=DIGEST, layers=6, parameters=100),
    builders=(Choice(name="crash", settings={"keep": 4}),),
    **{"layers": (0, 2, 5), "trainable": (0, 5), "shared": {1: 0}, "narrow": {1: {"mlp.up": (4, 8)}}},
    **{"parameters": 50, "verbatim": 50, "lossy": 0},
    files=(FileEntry(path="model.safetensors", digest=DIGEST, size=9),),
)
RUN = {
    **{"model": "m", "name": "x", "rounds": 2, "sites": ["a"], "evaluation": {"exam": "e.jsonl"}, "stall_s": 5.0},
    "method": {"name": "lora", "settings": {"rank": 4, "ranks": {"a": 2}}},
    "builders": [{"name": "crash", "settings": {"keep": 5}}],
    "training": {"steps": 4, "learning_rate": 0.1, "seed": 3, "precision": "bf16"},
    "merge": True,
}
TASK = {
    **{"run": "r", "round": 0, "rounds": 1, "site": "a", "attempt": 0, "base": DIGEST, "method_hash": DIGEST},
    **{"manifest": DIGEST, "manifest_size": 9, "adapter": DIGEST, "adapter_size": 9, "update_size": 9},
    **{"method": {"name": "lora"}, "training": {"steps": 4, "learning_rate": 0.1}},
}
GOOD: list[tuple[type[Any], dict[str, Any]]] = [
    (RunSpec, RUN),
    (TaskSpec, TASK),
    (Manifest, to_plain(MANIFEST)),
    (Span, {"kind": "training", "start": 1.0, "end": 2.0}),
    (EngineSpec, {"name": "plain", "processes": 2}),
    (Policy, {"bases": ["any"], "data": ["/data"]}),
]
DOCUMENTS = [document for document, _ in GOOD] + [UpdateMetrics]


def read(document: type[Any], data: bytes | str) -> None:
    """What is read is written as JSON that reads back as it; what is not is refused in a sentence."""
    try:
        made = from_json(document, data, where="it")
    except InputError as error:
        told(error)
    else:
        assert from_json(document, to_json(made), where="it") == made
        json.loads(to_json(made), parse_constant=lambda constant: pytest.fail(constant))


@given(st.sampled_from(GOOD).flatmap(lambda pair: st.tuples(st.just(pair[0]), changed(pair[1]))))
def test_a_document_with_something_odd_in_it(pair: tuple[type[Any], Any]) -> None:
    read(pair[0], as_json(pair[1]))


@given(
    st.binary(max_size=200) | st.builds(as_json, values) | st.text(st.characters(exclude_categories=()), max_size=99)
)
def test_what_is_hardly_a_document(data: bytes | str) -> None:
    for document in DOCUMENTS:
        read(document, data)


@given(st.sampled_from(["[", '{"a":', "1", '"', "9", "\\u", "-", "1e", "[[1],", " "]), st.integers(0, 20_000))
def test_the_same_again_and_again(part: str, count: int) -> None:
    read(RunSpec, part * count)
    read(RunSpec, '{"model": "m", "method": {"name": "lora", "settings": {"a": ' + part * count + "}}}")


KEYS = st.sampled_from(
    ["model", "rounds", "training.steps", "method.settings.rank", '"\\u0000"', "a.b", "[x]", "sites"]
)
TOML_VALUES = st.sampled_from(
    [
        "1",
        "0x" + "f" * 5000,
        "9" * 5000,
        "inf",
        "-nan",
        "1e999",
        "2020-01-01",
        '"a"',
        "'''x",
        "true",
        "[1, 2",
        "{a = 1}",
    ]
    + ["[" * 500, "{a=" * 200, '"\\ud800"', '"\\U00110000"', "1_000", "07:32:00", "[]", "[[{}]]", "\x00", "é"]
)
LINES = st.builds("{} = {}".format, KEYS, TOML_VALUES) | st.text(max_size=20) | st.builds("[{}]".format, KEYS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(
    data=st.binary(max_size=100)
    | st.lists(LINES, max_size=6).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
)
def test_settings_files(folder: Path, data: bytes) -> None:
    (folder / "it.toml").write_bytes(data)
    for document in (RunSpec, Policy):
        try:
            from_toml(document, folder / "it.toml")
        except InputError as error:
            told(error)


PARTS = [
    "model",
    "rounds",
    "name",
    "training",
    "steps",
    "seed",
    "method",
    "settings",
    "rank",
    "builders",
    "0",
    "9",
    "sites",
]
PATHS = st.lists(st.sampled_from(PARTS) | texts, min_size=1, max_size=5).map(".".join)
VALUES = texts | st.builds(lambda value: as_json(value).decode(), values) | st.sampled_from(["[" * 9000, "9" * 9000])


@given(st.lists(st.builds("{}={}".format, PATHS, VALUES) | texts, max_size=4))
def test_settings_on_a_command_line(settings: list[str]) -> None:
    for given_ in ({}, dict(RUN)):
        try:
            parse(RunSpec, assign(settings, json.loads(json.dumps(given_)), RunSpec), where="run")
        except InputError as error:
            told(error)


TOKENS = [
    "crash",
    "(",
    ")",
    "+",
    "=",
    "|",
    ",",
    "[",
    "]",
    '"',
    "1",
    "keep",
    "true",
    "none",
    "1e999",
    "9" * 5000,
    "\\u",
    " ",
]
RECIPES = st.lists(st.sampled_from(TOKENS) | texts, max_size=25).map("".join) | st.sampled_from(
    [
        "a(b=" + "[" * 9000,
        "a(" + ",".join(f"s{n}=1|2" for n in range(60)) + ")",
        "a+" * 9000,
        'a(b="\\ud800")',
        "a(b=1|" * 99,
    ]
)


@given(RECIPES)
def test_recipes(text: str) -> None:
    for reading in (recipes.parse, recipes.expand, recipes.parse_one):
        try:
            made: Any = reading(text)
        except InputError as error:
            told(error)
        else:
            if reading is recipes.parse:
                assert recipes.parse(recipes.render(made)) == made


FAMILIES: list[Any] = [(builders.BUILDERS, builders.make), (methods.METHODS, methods.make)]
FAMILIES.append((placements.PLACEMENTS, placements.make))
FAMILIES.append((parts.PARTS, parts.make))
FAMILIES.append((schedules.SCHEDULES, schedules.make))
FAMILIES.append((objectives.OBJECTIVES, objectives.make))
FAMILIES.append((optimisers.OPTIMISERS, optimisers.make))
SETTINGS = [
    "keep",
    "rank",
    "alpha",
    "ranks",
    "targets",
    "steps",
    "seed",
    "bottom",
    "count",
    "format",
    "block",
    "sharing",
]


@given(st.data())
def test_settings_of_plug_ins(data: st.DataObject) -> None:
    known, make = data.draw(st.sampled_from(FAMILIES))
    name = data.draw(st.sampled_from(sorted(known)) | texts)
    settings = data.draw(st.dictionaries(st.sampled_from(SETTINGS) | texts, scalars | values, max_size=3))
    try:
        make(name, settings)
    except ValueError as error:
        told(error)


@given(
    texts
    | st.lists(st.sampled_from([":", "[", "]", "::1", "localhost", "1", "://", "%", "/", "@", "70000"])).map("".join)
)
def test_addresses(text: str) -> None:
    try:
        address = addresses.parse(text)
    except InputError as error:
        told(error)
    else:
        assert addresses.parse(str(address)) == address


def test_hostile_values_are_hostile() -> None:
    assert len(json.dumps(deep("[", 60))) == 121
