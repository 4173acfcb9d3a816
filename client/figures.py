"""The figures of a run as one table, per site and over all, then what moved and where the time went."""

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from offsite.protos.documents import plain
from offsite.protos.figures import EMULATOR_TUNED, EMULATOR_ZERO_SHOT, FIGURES, PLUG_IN, title

MOST = 40  # lines of one kind; the report has them all


def table(report: dict[str, Any]) -> RenderableType:
    """Draw a report: what could not be measured is blank, what is no number is said to be none."""
    notes = [lineage(report)] if report.get("continues") else []
    notes += ended(report)
    notes += [f"warning: {warning}" for warning in report["warnings"]]
    notes += missing(report)
    if not report["overall"]:
        none = "no figures of the plug-in: the run names no held-out examples (evaluation)"
        return Group(*_lines([*notes, none]), *held_out(report), Text(moved(report)))
    caption = "perplexity on held-out data (lower is better)"
    grid = Table(title=caption, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))  # fits 80 columns
    grid.add_column("")
    for name, figure in FIGURES.items():
        grid.add_column(figure.head, justify="right", style="bold green" if name == PLUG_IN else "")
    grid.add_column("tokens", justify="right", style="dim")
    for name, row in sorted(report["sites"].items()):
        tokens = str(report["tokens"].get(name, ""))
        grid.add_row(plain(name, most=64), *_cells(report, f"sites.{name}", row), tokens)
    grid.add_section()
    tokens = str(sum(report["tokens"].values()))
    grid.add_row("all", *_cells(report, "overall", report["overall"]), tokens, style="bold")
    notes += [
        f"! {place.removeprefix('sites.')}, {title(figure)}: {why}"
        for place, one in report.get("marks", {}).items()
        if place != "overall"  # that is among the warnings
        for figure, why in one.items()
    ][:MOST]
    notes += [
        f"attack: {one['name']}: perplexity {short(one['overall']) or 'not finite'}"
        for one in report.get("attacks", ())
    ]
    notes += [
        f"of the plug-in's ensemble, {name} alone: perplexity {short(one['overall']) or 'not finite'}"
        for name, one in report.get("experts", {}).items()
    ]
    if own := report.get("owner"):
        figures = (f"{FIGURES[name].title} {short(value)}" for name, value in own.items() if name in FIGURES)
        notes.append(f"on the owner's own text: {', '.join(figures)}")
    notes.append(f"{report['protection']['label']}: {report['protection']['reason']}")
    return Group(grid, *_lines(notes), *held_out(report), Text(moved(report)))


def held_out(report: dict[str, Any]) -> Sequence[RenderableType]:
    """Draw what sites told of the rows that they hold out, and how well that foretells the plug-in."""
    exam = report.get("exam")
    if not exam:
        return []
    if "owner" in report:  # the rows above are theirs
        return _lines([exam["prediction"]["reason"]])
    figures = (EMULATOR_ZERO_SHOT, EMULATOR_TUNED)
    caption = "perplexity on rows that never left their sites (lower is better)"
    grid = Table(title=caption, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for head in ("", *(FIGURES[name].head for name in figures), "rows", "tokens"):
        grid.add_column(head, justify="right" if head else "left", style="dim" if head in ("rows", "tokens") else "")
    for site, row in sorted(exam["sites"].items())[:MOST]:
        name = plain(site, most=64) + (", with noise" if row["noised"] else "")
        grid.add_row(name, *(short(row.get(figure)) for figure in figures), f"{row['rows']:,}", f"{row['tokens']:,}")
    if len(exam["sites"]) > MOST:
        grid.add_row(f"and {len(exam['sites']) - MOST} more")
    grid.add_section()
    grid.add_row("all", *(short(exam["overall"].get(figure)) for figure in figures), style="bold")
    return [grid, *_lines([exam["prediction"]["reason"]])]


def lineage(report: dict[str, Any]) -> str:
    """Say what a run went on from."""
    last = report["continues"]
    return f"goes on from round {last['round']} of run {last['run']} ({last['rounds']} rounds led to it)"


def ended(report: dict[str, Any]) -> list[str]:
    """Say where a run stopped, which of its versions is its outcome if not the last one, and what its gate found."""
    end = report.get("outcome") or {"stopped": "", "round": 0, "last": 0}
    best = (
        f"figures and files are those of round {end['round']}, the best that was measured; the last version, that of "
        f"round {end['last']}, is in last/"
    )
    gate = [
        f"gate: {one['check']} {'holds' if one['holds'] else 'does not hold, and held all back'}: {one['reason']}"
        for one in report.get("gate", ())
    ]
    return [words for words in (end["stopped"], best if end["round"] != end["last"] else "", *gate) if words]


def missing(report: dict[str, Any]) -> list[str]:
    """Say who is missing from which round, and why."""
    lines = [
        f"round {absence['round']} without {absence['site']}: {absence['state']}: {absence['message']}"
        for absence in report.get("left_out", ())
    ]
    lines += [
        f"round {late['round']} without {late['site']}: its update came late, and is in round {late['folded_in']} with "
        f"a weight of {late['weight']:.2f}"
        for late in report.get("late", ())
    ]
    return [*lines[:MOST], *([f"and {len(lines) - MOST} more that were left out"] if len(lines) > MOST else [])]


def moved(report: dict[str, Any]) -> str:
    """Say in a line what was moved and where the time went."""
    traffic, time = report["bytes"], report["seconds"]
    parts = [
        f"{kind} {time[kind]:.0f}" for kind in ("training", "evaluation", "loading", "download") if time[kind] >= 0.5
    ]
    share = f" = {time['overhead'] / time['total']:.0%}" if time["total"] > 0 else ""
    parts.append(f"overhead {time['overhead']:.0f}{share}")
    return (
        f"{traffic['down'] / 1e6:.1f} MB down to the sites, {traffic['up'] / 1e6:.2f} MB up; "
        f"{time['total']:.0f} s in all ({', '.join(parts)})"
    )


def short(value: Any, digits: int = 2) -> str:
    """Write a figure briefly: a huge one by its power of ten, what is no number as nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def _cells(report: dict[str, Any], place: str, row: dict[str, Any]) -> list[str]:
    """Write the figures of a row, those that cannot be right with a mark."""
    infinite, marked = report.get("not_finite", ()), report.get("marks", {}).get(place, {})
    texts = {figure: "not finite" if f"{place}.{figure}" in infinite else short(row.get(figure)) for figure in FIGURES}
    return [f"{text}!" if text and figure in marked else text for figure, text in texts.items()]


def _lines(sentences: list[str]) -> list[Text]:
    return [Text(plain(line)) for line in sentences]
