"""Recipes: what is written reads back, grids are products, faults are named by their place."""

import re
from pathlib import Path
from typing import Any

import pytest

from offsite.protos.errors import InputError
from offsite.protos.recipes import expand, gather, parse, parse_one, render
from offsite.protos.spec import Choice

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
    ("4bit", "4bit"),
    ("1.5.2", "1.5.2"),
    ('"20"', "20"),
    ('"none"', "none"),
    (r'"a \"b\", c)"', 'a "b", c)'),
    ("[q_proj,v_proj]", ["q_proj", "v_proj"]),
    ("[]", []),
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
        ("", 1, "expected a name such as crash, found the end"),
        ("(keep=20)", 1, "expected a name such as crash, found '('"),
        ("crash(keep=20", 14, "expected ',' or ')', found the end"),
        ("crash(keep=20 sharing=auto)", 15, "expected ',' or ')', found 's'"),
        ("crash(keep)", 11, "expected '=', found ')'"),
        ("crash(keep=)", 12, "expected a value, found ')'"),
        ("crash(keep=20,keep=24)", 15, "expected a setting that crash does not have yet"),
        ("crash(keep=20) quantised", 16, "expected '+' or the end, found 'q'"),
        ("crash+", 7, "expected a name such as crash, found the end"),
        ('crash(sharing="auto)', 15, "expected a text that ends with"),
        (r'crash(sharing="\q")', 15, "expected a text as in JSON"),
        ("crash(keep=[1)", 14, "expected ',' or ']', found ')'"),
    ],
)
def test_a_fault_is_named_by_its_place_with_an_example(text: str, column: int, expected: str) -> None:
    with pytest.raises(InputError, match=rf"column {column}: {re.escape(expected)}.*a recipe reads like crash"):
        expand(text)


def test_alternatives_are_refused_where_one_chain_is_asked_for() -> None:
    with pytest.raises(InputError, match="column 14: expected one value, as this is no grid"):
        parse("crash(keep=20|24)")


def test_one_choice_is_one() -> None:
    assert parse_one("ends(bottom=1,top=1)") == Choice(name="ends", settings={"bottom": 1, "top": 1})
    with pytest.raises(InputError, match="expected one choice such as crash, found 2"):
        parse_one("crash+distilled")


def test_a_table_cannot_be_written_as_a_recipe() -> None:
    with pytest.raises(InputError, match="cannot hold a setting of the kind dict"):
        render([Choice(name="lora", settings={"ranks": {"a": 1}})])
