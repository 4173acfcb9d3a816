"""Recipes: what is written reads back, grids are products, faults are named by their place."""

import re
from pathlib import Path
from typing import Any

import pytest

from offsite.protos.assignments import assign
from offsite.protos.documents import from_toml, to_json
from offsite.protos.documents import parse as read
from offsite.protos.errors import InputError
from offsite.protos.recipes import expand, gather, parse, parse_one, render
from offsite.protos.spec import Choice, RunSpec

VALUES: list[tuple[str, Any]] = [
    ("20", 20),
    ("-3", -3),
    ("1e-3", 0.001),
    ("2.", 2.0),
    (".5", 0.5),
    ("1e+20", 1e20),
    ("true", True),
    ("false", False),
    ("none", None),
    ("auto", "auto"),
    ("all-linear", "all-linear"),
    ('"4bit"', "4bit"),
    ("'a'", "a"),
    ('"is"', "is"),
    ('"\U0001f600 \u2028"', "\U0001f600 \u2028"),
    ('"20"', "20"),
    ('"none"', "none"),
    (r'"a \"b\", c)"', 'a "b", c)'),
    ("[q_proj,v_proj]", ["q_proj", "v_proj"]),
    ("[]", []),
    ("{bank: 4, 'a b': [1]}", {"bank": 4, "a b": [1]}),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_a_value_is_read_as_what_it_says_and_written_so_that_it_reads_back(text: str, value: Any) -> None:
    (choice,) = parse(f"x(y={text})")
    assert choice.settings["y"] == value and type(choice.settings["y"]) is type(value)
    assert parse(render([choice])) == (choice,)


def test_a_chain_is_read_in_order_and_blanks_do_not_count() -> None:
    chain = (Choice(name="crash", settings={"keep": 20, "sharing": "auto"}), Choice(name="low-rank"))
    assert parse("crash(keep=20,sharing=auto)+low-rank") == chain
    assert parse("  crash ( keep = 20 , sharing = auto ) + low-rank() ") == chain
    assert render(chain) == "crash(keep=20,sharing=auto)+low-rank"


def test_a_grid_is_the_product_of_its_alternatives() -> None:
    grid = expand("crash(keep=20|24)+quantised(format=nf4|int4)+distilled")
    assert [render(chain) for chain in grid] == [
        "crash(keep=20)+quantised(format=nf4)+distilled",
        "crash(keep=20)+quantised(format=int4)+distilled",
        "crash(keep=24)+quantised(format=nf4)+distilled",
        "crash(keep=24)+quantised(format=int4)+distilled",
    ]
    assert expand("whole") == [(Choice(name="whole"),)]


def test_grids_are_gathered_from_recipes_and_files_each_chain_once(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text('recipes = ["uniform(keep=3|4)", "whole"]')
    assert [render(chain) for chain in gather(["whole", str(file), "uniform(keep=4)"])] == [
        "whole",
        "uniform(keep=3)",
        "uniform(keep=4)",
    ]
    file.write_text('recipe = "whole"')
    with pytest.raises(InputError, match=r'grid.toml: expected one list of texts, recipes = \["crash'):
        gather([str(file)])


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        ("", 1, "expected a name such as crash, found nothing"),
        ("(keep=20)", 2, ""),
        ("crash(keep=20", 6, "'(' was never closed"),
        ("  crash(keep=20", 8, "'(' was never closed"),
        ("crash(keep=20 sharing=auto)", 12, "invalid syntax"),
        ("crash(20)", 7, "expected a setting such as keep=20, found '20'"),
        ("crash(keep)", 7, "expected a setting such as keep=20, found 'keep'"),
        ("crash(**keep)", 7, "expected a setting that is not there yet"),
        ("crash(keep=)", 12, ""),
        ("crash(keep=20,keep=24)", 15, "expected a setting that is not there yet, such as keep=20, found 'keep=24'"),
        ("crash(keep=20) quantised", 16, "invalid syntax"),
        ("crash+", 7, "invalid syntax"),
        ("crash+(a+b)", 8, "expected a name such as crash, found 'a+b'"),
        ('crash(sharing="auto)', 15, "unterminated string literal"),
        ("crash(keep=[1)", 14, "closing parenthesis ')' does not match"),
        ("crash(keep=open(1))", 12, "expected a value, found 'open(1)'"),
        ("crash(keep=1+1)", 12, "expected a value, found '1+1'"),
        ("crash(keep='\N{SNOWMAN}', sharing=1j)", 25, "expected a value, found '1j'"),
        ("crash(keep={1: 2})", 13, "expected a word or a text for each value of a table, found '1'"),
    ],
)
def test_a_fault_is_named_by_its_place_with_an_example(text: str, column: int, expected: str) -> None:
    with pytest.raises(InputError, match=rf"column {column}: {re.escape(expected)}.*a recipe reads like crash"):
        expand(text)


@pytest.mark.parametrize("text", ["[" * 9000, "a+" * 4999 + "a", f"a(b={'-' * 9000}1)", f"a(b={'9' * 5000})", "a\0"])
def test_what_is_too_deep_too_long_or_no_text_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(InputError, match="a recipe reads like crash"):
        expand(text)


def test_alternatives_are_refused_where_one_chain_is_asked_for() -> None:
    with pytest.raises(InputError, match="column 15: expected one value, as this is no grid, found '24'"):
        parse("crash(keep=20|24)")


def test_nothing_of_a_recipe_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        parse("crash(keep=print(1))")
    assert capsys.readouterr().out == ""


def test_one_choice_is_one() -> None:
    assert parse_one("ends(bottom=1,top=1)") == Choice(name="ends", settings={"bottom": 1, "top": 1})
    with pytest.raises(InputError, match="expected one choice such as crash, found 2"):
        parse_one("crash+distilled")


def test_a_run_takes_a_recipe_wherever_it_takes_a_choice_or_a_chain(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\nbuilders = "crash(keep=24) + quantised"\nmethod = "lora(ranks={bank: 4})"\n')
    long = {
        "model": "m",
        "builders": [{"name": "crash", "settings": {"keep": 24}}, {"name": "quantised"}],
        "method": {"name": "lora", "settings": {"ranks": {"bank": 4}}},
    }
    assert from_toml(RunSpec, file) == read(RunSpec, long, where="run")
    given = assign(["model=m", "method=lora(rank=4)", "builders.0.settings.keep=3"], {}, RunSpec)
    spec = read(RunSpec, given, where="run")
    assert spec.method == Choice(name="lora", settings={"rank": 4})
    assert spec.builders == (Choice(name="crash", settings={"keep": 3}),)
    assert b'"method":{"name":"lora","settings":{"rank":4}}' in to_json(spec)  # what travels is the choice


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "lora("}, r"^run: method: recipe 'lora\(', column 5: '\(' was never closed"),
        ({"method": "lora+lora"}, "^run: method: expected one choice, got 2"),
        ({"builders": "a+b+c+d+e"}, "^run: builders: expected at most 4 choices, got 5"),
        ({"builders": "a(b=1|2)"}, "^run: builders: recipe .* column 7: expected one value, as this is no grid"),
        ({"builders": []}, r"^run: builders: Tuple should have at least 1 item after validation, not 0 \(got \[\]\)"),
        (
            {"method": {"name": "lora", "setings": {}}},
            r"^run: method.setings: there is no such field; did you",
        ),
        ({"method": 3}, r"^run: method: expected a table \(got 3\)"),
    ],
)
def test_a_recipe_in_a_run_is_refused_with_its_field(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(RunSpec, {"model": "m", **fields}, where="run")
