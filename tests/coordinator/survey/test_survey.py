"""The tables of methods and of what goes together, and the pages that are written from them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator import aggregation
from offsite.coordinator.commands.legality import legality as print_legality
from offsite.coordinator.commands.methods import methods as print_methods
from offsite.coordinator.runs import legality, pairs
from offsite.coordinator.survey import rows as survey_rows
from offsite.coordinator.survey.errors import errors
from offsite.coordinator.survey.matrix import Matrix, matrix
from offsite.coordinator.survey.rows import Row, emulators, survey
from offsite.emulator.builders import BUILDERS
from offsite.emulator.methods import METHODS
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice, RunSpec

ROOT = Path(__file__).parents[3]
PAIRS: Matrix = matrix()


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    found, faults = survey()
    assert faults == []
    return {row.name: row for row in found}


@pytest.fixture
def printed(rows: dict[str, Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands print the rows that were found once, for all are measured, with the errors of the page."""
    errors = documented()
    told = [replace(row, errors=errors[name]) for name, row in rows.items()]
    monkeypatch.setattr(survey_rows, "survey", lambda **_: (told, []))


def documented() -> dict[str, dict[str, float]]:
    """Return the errors that the page of methods has, by method and strategy."""
    page = (ROOT / "docs" / "methods.md").read_text().partition("## How it is averaged")[2].partition("\n- ")[0]
    cells = [[cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| `")]
    return {
        cell[0].strip("|` "): {
            name: float(error)
            for part in cell[3].split("; ")
            for names, _, error in [part.partition(": ")]
            for name in names.split(", ")
            if error
        }
        for cell in cells
    }


@pytest.mark.slow
@pytest.mark.usefixtures("printed")
@pytest.mark.parametrize(("page", "write"), [("methods", print_methods), ("legality", print_legality)])
def test_a_page_is_what_its_command_writes(page: str, write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write(format="markdown")
    assert capsys.readouterr().out == (ROOT / "docs" / f"{page}.md").read_text(), (
        f"write it anew: offsite {page} --format markdown > docs/{page}.md"
    )


@pytest.mark.slow
def test_every_method_has_a_row_with_the_sizes_of_a_layer(rows: dict[str, Row]) -> None:
    assert rows.keys() == METHODS.keys()
    lora = rows["lora"]
    assert lora.values * 30 == 2_442_240  # of rank 8 on all seven maps of SmolLM2-135M's layers
    assert lora.update_bytes == 4 * lora.values and lora.training_bytes == 16 * lora.values
    assert (lora.exact, lora.near, lora.mergeable, lora.seeded) == (["low-rank"], ["factor-mean"], True, True)
    paca = rows["paca"]
    assert paca.update_bytes == 4 * (paca.values + 7 * 8)  # and an index of eight columns for each map
    assert paca.tensors == {"change": "F32 mean", "columns": "I32 fixed"} and paca.near == []
    assert rows["blocks"].spares == ["additive", "loram", "quantised", "sketch"]
    assert emulators(rows["grids"]) == "of sketch"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name, kind in METHODS.items() if not hasattr(kind, "measure")))
def test_what_is_called_exact_is_and_the_error_of_what_is_near_is_the_pages(name: str) -> None:
    method = METHODS.make(name, {})
    measured = errors(method, pairs.strategies(method))
    for strategy, error in measured.items():
        if pairs.is_exact(method, aggregation.STRATEGIES[strategy]):
            assert error < 1e-5, strategy
        else:
            assert error == pytest.approx(documented()[name][strategy], rel=0.5) and error > 1e-3, strategy


@pytest.mark.slow
@pytest.mark.usefixtures("printed")
def test_programs_get_the_same_rows(rows: dict[str, Row], capsys: pytest.CaptureFixture[str]) -> None:
    print_methods(format="json")
    document = json.loads(capsys.readouterr().out)
    assert [Row(**row | {"errors": {}}) for row in document["methods"]] == [rows[name] for name in sorted(rows)]
    assert document["refused"]["prompt_tuning"].startswith("it trains tokens") and not document["refused"].keys() & rows


def test_a_method_of_another_package_has_a_row_and_one_that_states_too_little_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "plugin")
    monkeypatch.setattr(METHODS, "_ours", {})
    points = [EntryPoint("sparse", "offsite_sparse:Sparse", METHODS.group)]
    monkeypatch.setattr(METHODS, "_points", {"sparse": points})
    ((row,), faults) = survey()
    assert (row.name, row.source, row.formula, faults) == (
        "sparse",
        "offsite_sparse:Sparse",
        "entries, each map",
        [],
    )
    monkeypatch.delattr(METHODS["sparse"], "formula")
    monkeypatch.setattr(METHODS, "_loaded", {})
    rows, (fault,) = survey()
    assert rows == [] and fault.endswith("is unfit: offsite_sparse:Sparse does not state its formula")
    assert matrix().merging == {}


def judge(method: str, builders: tuple[str, ...], strategy: str, text: Path, *, merge: bool = False) -> None:
    chain = tuple(Choice(name=name) for name in builders)
    spec = RunSpec(
        model="nowhere",
        start="sums",  # for methods that begin from what was measured
        builders=chain,
        method=Choice(name=method),
        strategy=Choice(name=strategy),
        public=str(text),
        merge=merge,
    )
    legality.judge(spec)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    (tmp_path / "public.jsonl").write_text('{"text": "some words"}\n')
    yield tmp_path / "public.jsonl"


def chain(method: str, builder: str) -> tuple[str, ...]:
    """Return a builder with those that it needs, and after it what a method needs, if the table says so."""
    before = [name for name, kind in BUILDERS.items() if kind.provides & BUILDERS[builder].needs][:1]
    cell = PAIRS.builders[method][builder]
    return (*before, builder, *([cell.split()[1]] if cell.startswith("with") else []))


@pytest.mark.parametrize("method", PAIRS.strategies)
def test_a_run_may_ask_for_the_strategies_that_its_methods_row_has_and_for_no_others(method: str, text: Path) -> None:
    has = chain(method, next(name for name, cell in PAIRS.builders[method].items() if cell))
    fitting = [name for name, cell in PAIRS.strategies[method].items() if cell]
    for strategy, cell in PAIRS.strategies[method].items():
        if cell:
            judge(method, has, strategy, text)
        else:
            with pytest.raises(InputError, match=f"use one of: {', '.join(fitting)}$"):
                judge(method, has, strategy, text)
    if PAIRS.merging[method]:
        judge(method, has, fitting[0], text, merge=True)
    else:
        with pytest.raises(InputError, match="leave merge out"):
            judge(method, has, fitting[0], text, merge=True)


@pytest.mark.parametrize("method", PAIRS.builders)
def test_a_run_may_ask_for_the_builders_that_its_methods_row_has_and_for_no_others(method: str, text: Path) -> None:
    strategy = next(name for name, cell in PAIRS.strategies[method].items() if cell)
    for builder, cell in PAIRS.builders[method].items():
        if cell:
            judge(method, chain(method, builder), strategy, text)
        if not cell or cell.startswith("with"):
            with pytest.raises(InputError, match=r"put \w+.* among the builders, or use one of the methods \w+"):
                judge(method, chain(method, builder)[:-1] if cell else chain(method, builder), strategy, text)
