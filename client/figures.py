"""The figures of a run as one table, per site and over all, then what moved and where the time went."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

FIGURES = {
    "base_zero_shot": "base\nzero-shot",
    "emulator_zero_shot": "emulator\nzero-shot",
    "emulator_tuned": "emulator\ntuned",
    "plug_in": "plug-in",
    "base_tuned": "base\ntuned",
    "attack": "attack",
}


def table(report: dict[str, Any]) -> RenderableType:
    """Draw a report; figures that a run could not measure are left blank."""
    title = "perplexity on held-out data (lower is better)"
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))  # fits 80 columns
    grid.add_column("")
    for figure, head in FIGURES.items():
        grid.add_column(head, justify="right", style="bold green" if figure == "plug_in" else "")
    grid.add_column("tokens", justify="right", style="dim")
    for name, row in sorted(report["sites"].items()):
        grid.add_row(name, *_cells(row), str(report["tokens"].get(name, "")))
    grid.add_section()
    grid.add_row("all", *_cells(report["overall"]), str(sum(report["tokens"].values())), style="bold")
    said = [f"warning: {warning}" for warning in report["warnings"]]
    said.append(f"{report['protection']['label']}: {report['protection']['reason']}")
    return Group(grid, *map(Text, said), moved(report))


def moved(report: dict[str, Any]) -> str:
    """Say in a line what was moved and where the time went."""
    sent, time = report["bytes"], report["seconds"]
    split = ", ".join(
        f"{kind} {time[kind]:.0f}" for kind in ("training", "evaluation", "loading", "download") if time[kind] >= 0.5
    )
    return (
        f"{sent['down'] / 1e6:.1f} MB down to the sites, {sent['up'] / 1e6:.2f} MB up; "
        f"{time['total']:.0f} s in all ({split}, "
        f"overhead {time['overhead']:.0f} = {time['overhead'] / time['total']:.0%})"
    )


def _cells(row: dict[str, float]) -> list[str]:
    return [_short(row[figure]) if row.get(figure) is not None else "" for figure in FIGURES]


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
