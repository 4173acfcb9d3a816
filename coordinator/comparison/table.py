"""A comparison in the terminal."""

import shlex

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from offsite.coordinator.comparison.rows import ATTACKS, FIVE, Comparison, Row
from offsite.protos.figures import FIGURES, PLUG_IN
from offsite.protos.recipes import render


def table(comparison: Comparison) -> RenderableType:
    """Draw a comparison: what each is worth, gives away and costs, what is wrong with it, and the recommendation."""
    faults = [
        Text(f"{row.number}: {text}", style="yellow")
        for row in comparison.rows
        for text in ([f"not measured: {row.fault}"] if row.fault else row.warnings)
    ]
    tasks = [_answers(comparison)] if comparison.tasks else []
    return Group(
        _figures(comparison),
        _given_away(comparison),
        _costs(comparison),
        *tasks,
        *faults,
        Text(verdict(comparison), "bold"),
        *_next(comparison),
    )


def verdict(comparison: Comparison) -> str:
    """Say the recommendation and its reason."""
    row = _recommended(comparison)
    return f"Recommended: number {row.number}, {row.candidate.name}. {comparison.reason}" if row else comparison.reason


def next_step(comparison: Comparison) -> str:
    """Return the command that builds the recommended emulator, or nothing."""
    row = _recommended(comparison)
    if row is None:
        return ""
    words = ["offsite", "emulator", "build", comparison.model, "--builder", render(row.candidate.builders)]
    words += ["--trainable", render([row.candidate.trainable]), "--public", comparison.public]
    if comparison.settings["calibration"]:
        words += ["--calibration", comparison.settings["calibration"]]
    return shlex.join([*words, "--out", "bundle"])


def _next(comparison: Comparison) -> list[Text]:
    step = next_step(comparison)
    return [Text(f"Next: {step}")] if step else []


def _recommended(comparison: Comparison) -> Row | None:
    return next((row for row in comparison.rows if row.number == comparison.recommended), None)


def _figures(comparison: Comparison) -> Table:
    grid = _grid("perplexity on held-out text (lower is better); * on the frontier, > recommended")
    grid.add_column("candidate", overflow="fold")
    for name in FIVE:
        grid.add_column(FIGURES[name].head, justify="right", style="bold green" if name == PLUG_IN else "")
    for row in comparison.rows:
        cells = [short(row.measured.figures[name].held_out.perplexity) for name in FIVE if row.measured]
        grid.add_row(_number(comparison, row), Text(row.label), *cells or ["failed"])
    return grid


def _given_away(comparison: Comparison) -> Table:
    grid = _grid("the strongest attacks (perplexity, and on general text), what the plug-in loses, what a site is told")
    for name in ATTACKS:
        grid.add_column(f"attack:\n{name}", justify="right", style="red")
        grid.add_column("on\ngeneral", justify="right", style="dim")
    for head in ("margin\n(nats)", "behind\nbound", "pro-\ntected", "ver-\nbatim", "lossy"):
        grid.add_column(head, justify="right")
    for row in comparison.rows:
        if row.measured and row.protection:
            one = row.measured.emulated
            scores = [row.measured.strongest[name].score for name in ATTACKS]
            cells = [short(text.perplexity) for score in scores for text in (score.held_out, score.general)]
            cells += [f"{row.protection.margin:.2f}", f"{row.measured.lost:.2f}"]
            cells += [
                "yes" if row.protection.label == "protected" else "no",
                share(one.verbatim, one.parameters),
                share(one.lossy, one.parameters),
            ]
            grid.add_row(_number(comparison, row), *cells)
    return grid


def _costs(comparison: Comparison) -> Table:
    grid = _grid("the bundle, and a client step against LoRA on the whole base")
    for head in ("MB to\ndownload", "GFLOPs", "of full", "peak MB", "of full", "CPU s", "of full"):
        grid.add_column(head, justify="right", style="dim" if head == "of full" else "")
    for row in comparison.rows:
        if row.measured:
            client, full = row.measured.client, row.measured.full
            grid.add_row(
                _number(comparison, row),
                f"{row.measured.emulated.bytes / 1e6:,.1f}",
                f"{client.flops / 1e9:,.1f}",
                share(client.flops, full.flops),
                f"{client.peak_bytes / 1e6:,.1f}",
                share(client.peak_bytes, full.peak_bytes),
                f"{client.cpu_s:.2f}",
                share(client.cpu_s, full.cpu_s),
            )
    return grid


def _answers(comparison: Comparison) -> Table:
    grid = _grid("accuracy at tasks")
    grid.add_column("task")
    for name in FIVE:
        grid.add_column(FIGURES[name].head, justify="right", style="bold green" if name == PLUG_IN else "")
    for row in comparison.rows:
        if row.measured:
            for task in comparison.tasks:
                answers = [row.measured.figures[name].accuracy[task] for name in FIVE]
                grid.add_row(_number(comparison, row), task, *(f"{one.accuracy:.1%}" for one in answers))
    return grid


def _grid(title: str) -> Table:
    grid = Table(title=title, title_justify="left")
    grid.add_column("", justify="right")
    return grid


def _number(comparison: Comparison, row: Row) -> str:
    mark = ">" if row.number == comparison.recommended else "*" if row.frontier else ""
    return f"{mark}{row.number}"


def short(value: float) -> str:
    """Write a perplexity in few characters."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def share(part: float, whole: float) -> str:
    """Write a part of a whole."""
    return f"{part / whole:.0%}" if whole else ""
