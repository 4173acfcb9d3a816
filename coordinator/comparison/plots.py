"""The plots of a comparison, as inline SVG."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offsite.coordinator.comparison.rows import FIVE, Comparison, Measured, Row
from offsite.coordinator.runs.report import UNUSABLE
from offsite.protos.figures import BASE_TUNED, BASE_ZERO_SHOT, FIGURES, PLUG_IN, title

CROSSES = {"unfreeze": "#b5473f", "heal": "#9b7bb8"}
QUIET, GOOD, INK = "#8c96a3", "#1b7f5c", "#1d2733"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "offsite",
}
Cost = tuple[str, Callable[[Measured], float], Callable[[Measured], float] | None]

# What it is, of a candidate, and of LoRA on the whole base where that has it.
COSTS: tuple[Cost, ...] = (
    ("MB to download", lambda one: one.emulated.bytes / 1e6, None),
    ("% of the base disclosed verbatim", lambda one: 100 * one.disclosed, None),
    ("GFLOPs of a client step", lambda one: one.client.flops / 1e9, lambda one: one.full.flops / 1e9),
    ("peak MB of a client step", lambda one: one.client.peak_bytes / 1e6, lambda one: one.full.peak_bytes / 1e6),
    ("CPU seconds of a client step", lambda one: one.client.cpu_s, lambda one: one.full.cpu_s),
)


def draw(comparison: Comparison) -> dict[str, str]:
    """Draw the plots of a comparison by name; none if nothing was measured."""
    rows = [row for row in comparison.rows if row.measured]
    if not rows:
        return {}
    with matplotlib.rc_context(STYLE):
        return {"frontier": _frontier(comparison, rows), "figures": _figures(rows)}


def _frontier(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Plug-in quality against protection and each cost, a small plot for each."""
    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    (margin, *rest) = figure.subplots(2, 3, sharey=True).flat
    _points(margin, comparison, rows, {row.number: row.protection.margin for row in rows if row.protection})
    margin.set_xlabel("margin over the attacks (nats)")
    margin.axvline(0.0, color=QUIET, linewidth=0.8)
    if (threshold := comparison.settings["protected_from"]) is not None:
        margin.axvline(threshold, color=GOOD, linewidth=1, linestyle=":")
        margin.annotate("threshold", (threshold, 1), xycoords=("data", "axes fraction"), fontsize=7, color=GOOD)
    for axes, (head, of, of_base) in zip(rest, COSTS, strict=True):
        _points(axes, comparison, rows, {row.number: of(row.measured) for row in rows if row.measured})
        axes.set_xlabel(head)
        if of_base and rows[0].measured:
            whole = of_base(rows[0].measured)
            axes.axvline(whole, color=INK, linewidth=1, linestyle=":")
            axes.annotate("LoRA on the base", (whole, 1), xycoords=("data", "axes fraction"), fontsize=7, ha="right")
        axes.set_xlim(left=0)
    for axes in (margin, rest[2]):
        axes.set_ylabel("plug-in perplexity")
    return _svg(figure)


def _points(axes: Axes, comparison: Comparison, rows: Sequence[Row], x: dict[int, float]) -> None:
    """One numbered point per candidate, between the lines of the base and of the best bound."""
    measured = [row.measured for row in rows if row.measured]
    base = measured[0].figures[BASE_ZERO_SHOT].held_out.perplexity
    bound = min(one.figures[BASE_TUNED].held_out.perplexity for one in measured)
    for level, name in ((base, BASE_ZERO_SHOT), (bound, BASE_TUNED)):
        axes.axhline(level, color=FIGURES[name].colour, linewidth=1, linestyle="--")
    for row in rows:
        if not row.measured:
            continue
        at = (x[row.number], row.measured.plug_in)
        colour = GOOD if row.frontier else QUIET
        axes.plot(*at, marker="o", markersize=7, color=colour, markerfacecolor="white" if row.warnings else colour)
        if row.number == comparison.recommended:
            axes.plot(*at, marker="o", markersize=13, color=GOOD, fillstyle="none")
        axes.annotate(str(row.number), at, xytext=(7, 5), textcoords="offset points", fontsize=8)
    axes.margins(0.15, 0.15)


def _figures(rows: Sequence[Row]) -> str:
    """The figures and the attacks, a line for each candidate; what is beyond usefulness stands at the edge."""
    figure = Figure(figsize=(9.6, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    measured = [row.measured for row in rows if row.measured]
    base = measured[0].figures[BASE_ZERO_SHOT].held_out.perplexity
    edge = UNUSABLE * base
    axes.axvline(base, color=FIGURES[BASE_ZERO_SHOT].colour, linewidth=1, linestyle="--", label=title(BASE_ZERO_SHOT))
    most = base
    for place, one in enumerate(measured):
        dots = {name: one.figures[name].held_out.perplexity for name in FIVE if name != BASE_ZERO_SHOT}
        hit = {name: one.strongest[name].score.held_out.perplexity for name in CROSSES}
        every = [min(value, edge) for value in (*dots.values(), *hit.values())]
        most = max(most, *every)
        axes.plot([min(every), max(every)], [place, place], color="#d5dbe2", linewidth=1, zorder=0)
        for name, value in dots.items():
            marker, size = ("o", 9 if name == PLUG_IN else 7) if value < edge else (">", 8)
            label = title(name) if not place else None
            axes.plot(min(value, edge), place, marker, color=FIGURES[name].colour, markersize=size, label=label)
        for name, value in hit.items():
            label = f"attack: {name}" if not place else None
            axes.plot(min(value, edge), place, "x", color=CROSSES[name], markersize=8, markeredgewidth=2, label=label)
    axes.set_yticks(range(len(rows)), [f"{row.number}  {row.label}" for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=1.15 * most)
    axes.set_xlabel("perplexity on held-out text (log scale)")
    figure.legend(frameon=False, fontsize=8, ncols=7, loc="outside upper center")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    _, mark, rest = buffer.getvalue().partition("<svg")
    return mark + rest
