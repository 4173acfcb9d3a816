"""Plots of what is told of several runs, as SVG."""

import io
import math
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from offsite.client.forgetting import Forgetting

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c96a3",
    "svg.fonttype": "none",
    "svg.hashsalt": "offsite",
}
COLOURS = ("#1b7f5c", "#3f6fb5", "#c8803c", "#9b7bb8", "#b5473f", "#8c96a3")


def forgetting(stream: Forgetting) -> str:
    """Draw what is gained over the base on each task, after each run of a stream; a dot where it was learned."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0.0, color="#d5dbe2", linewidth=1)
        for at, task in enumerate(stream.tasks):
            colour, base = COLOURS[at % len(COLOURS)], stream.losses[0].get(task, math.nan)
            gains = [base - losses.get(task, math.nan) for losses in stream.losses]
            axes.plot(range(len(gains)), gains, color=colour)
            learned = stream.learned(task)
            axes.plot([learned], [gains[learned]], "o", color=colour)
            end = (len(gains) - 1, gains[-1])
            axes.annotate(task, end, (6, 0), textcoords="offset points", color=colour, va="center")
        axes.set_ylabel("gain over the base, nats a token")
        names = ["base", *(f"after {stage.task or stage.run}" for stage in stream.stages)]
        axes.set_xticks(range(len(names)), names)
        axes.margins(x=0.08)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
