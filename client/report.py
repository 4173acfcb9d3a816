"""The report of a run as one HTML file that needs nothing else: tables, and plots as inline SVG."""

import io
import math
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offsite.client import plots as drawings
from offsite.client.figures import MOST, ended, short
from offsite.client.forgetting import Forgetting
from offsite.client.plots import STYLE
from offsite.protos.figures import FIGURES

KINDS = {
    "download": "#d5dbe2",
    "transfer": "#8c96a3",
    "loading": "#e0b37a",
    "building": "#9b7bb8",
    "training": "#1b7f5c",
    "aggregation": "#b5473f",
    "evaluation": "#3f6fb5",
}
Plot = Literal["figures", "losses", "times"]
TOLD_APART = 12  # sites that have a line and a name each in a plot


def write(report: dict[str, Any], path: Path, *, stream: Forgetting | None = None) -> None:
    """Write a run's report as HTML; `stream` is what it, and those that it went on from, have left of each task."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("offsite.client", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = short
    environment.filters["perplexity"] = lambda nats: "" if nats is None else short(math.exp(nats))
    environment.tests["finite"] = math.isfinite
    plots = {kind: _svg(plot(kind, report)) for kind in get_args(Plot)}
    if stream:
        plots["tasks"] = _inline(drawings.forgetting(stream))
    heads = {name: figure.title for name, figure in FIGURES.items()}
    page = environment.get_template("report.html.j2").render(
        report=report,
        plots=plots,
        figures=heads,
        marks=report.get("marks", {}),
        most=MOST,
        stream=stream,
        ended=ended(report),
    )
    path.write_text(page, encoding="utf-8")


def plot(kind: Plot, report: dict[str, Any]) -> Figure:
    """Draw perplexities ("figures"), training losses ("losses") or what was done when ("times")."""
    draw = {"figures": _bars, "losses": _losses, "times": _times}[kind]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        draw(figure, report)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _inline(document: str) -> str:
    """Return an SVG document as a page has it, without what comes before its first element."""
    return "".join(document.partition("<svg")[1:])


def _bars(figure: Figure, report: dict[str, Any]) -> None:
    """Perplexities per site and over all, on a log scale."""
    axes = figure.subplots()
    groups = {**report["sites"], "all": report["overall"]}
    names = [name for name in FIGURES if any(_drawn(row.get(name)) > 0 for row in groups.values())]
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        places = [group + index * width for group in range(len(groups))]
        values = [_drawn(row.get(name)) for row in groups.values()]
        bars = axes.bar(places, values, width * 0.92, label=FIGURES[name].title, color=FIGURES[name].colour)
        axes.bar_label(bars, [short(v, digits=1) if v == v else "" for v in values], fontsize=7, padding=1)
    if names:
        axes.set_yscale("log")
    axes.set_ylabel("perplexity (log scale)")
    axes.set_xticks([group + 0.4 - width / 2 for group in range(len(groups))], list(groups))
    _legend(axes, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _legend(axes: Axes, **where: Any) -> None:
    """Name what was drawn, if anything was."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, **where)


def _drawn(value: Any) -> float:
    """A figure as a plot can show it: NaN, which leaves a gap, for what is missing, no number or beyond any scale."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1e12 else math.nan


def _losses(figure: Figure, report: dict[str, Any]) -> None:
    """Training loss of every site over all rounds: a mean for each round, or each step's where a site tells it."""
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for round_ in report["rounds"]:
        begin = round_["round"] - 1
        for site, metrics in round_["sites"].items():
            losses = [_drawn(loss) for loss in metrics["losses"] or [metrics["loss"]]]
            width = 1 / len(losses)
            curves.setdefault(site, []).extend((begin + (at + 0.5) * width, loss) for at, loss in enumerate(losses))
        axes.axvline(round_["round"], color="#d5dbe2", linewidth=1)
    if len(curves) <= TOLD_APART:
        for site, points in sorted(curves.items()):
            axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=site)
    else:
        _crowd(axes, curves)
    axes.set_xlabel("round (a line ends each)")
    axes.set_ylabel("mean training loss (nats)")
    _legend(axes)


def _crowd(axes: Axes, curves: dict[str, list[tuple[float, float]]]) -> None:
    """Draw the losses of more sites than one can tell apart: the middle one of each moment, and most of the others."""
    moments: dict[float, list[float]] = {}
    for points in curves.values():
        for x, y in points:
            if y == y:
                moments.setdefault(x, []).append(y)
    xs = sorted(moments)
    low, middle, high = (
        [sorted(moments[x])[round(share * (len(moments[x]) - 1))] for x in xs] for share in (0.05, 0.5, 0.95)
    )
    axes.fill_between(xs, low, high, color="#1b7f5c", alpha=0.2, linewidth=0, label="nine of ten sites")
    axes.plot(xs, middle, marker=".", color="#1b7f5c", label=f"median of {len(curves):,} sites")


def _times(figure: Figure, report: dict[str, Any]) -> None:
    """What each process was doing, over the wall clock."""
    axes = figure.subplots()
    spans = report["spans"]
    first = min((span["start"] for span in spans if span["who"] == "coordinator"), default=0.0)
    reach = 2 * report["seconds"]["total"] + 1  # beyond it some site's clock is wrong
    spans = [span for span in spans if first - reach <= span["start"] <= span["end"] <= first + reach]
    begin = min((span["start"] for span in spans), default=0.0)
    who = list(dict.fromkeys(span["who"] for span in sorted(spans, key=lambda span: span["start"])))
    for kind, colour in KINDS.items():
        mine = [span for span in spans if span["kind"] == kind]
        if mine:
            axes.barh(
                [who.index(span["who"]) for span in mine],
                [span["end"] - span["start"] for span in mine],
                left=[span["start"] - begin for span in mine],
                color=colour,
                label=kind,
                height=0.6,
            )
    axes.set_yticks(range(len(who)), who)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the first of them")
    _legend(axes, ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
