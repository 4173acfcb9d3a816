"""Plots of what is told of several runs, as SVG."""

import io
import math

import matplotlib
from matplotlib.figure import Figure

from offsite.client.forgetting import Forgetting
from offsite.client.report import STYLE

COLOURS = ("#1b7f5c", "#3f6fb5", "#c8803c", "#9b7bb8", "#b5473f", "#8c96a3")


def forgetting(stream: Forgetting) -> str:
    """Draw the perplexity of each task over the runs of a stream, from the base on; a dot where it was learned."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots()
        for at, task in enumerate(stream.tasks):
            colour = COLOURS[at % len(COLOURS)]
            values = [math.exp(losses[task]) if task in losses else math.nan for losses in stream.losses]
            axes.plot(range(len(values)), values, color=colour, label=task)
            learned = stream.learned(task)
            axes.plot([learned], [values[learned]], "o", color=colour)
        axes.set_yscale("log")
        axes.set_ylabel("perplexity (log scale)")
        axes.set_xticks(
            range(len(stream.losses)), ["base", *(f"after {stage.task or stage.run}" for stage in stream.stages)]
        )
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
