"""The virtual clock as a plot: what the sites learn and send, over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from offsite.client.plots import STYLE

UNITS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def draw(rounds: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss, the bytes so far and the updates of each round, over virtual time or, without one, over rounds."""
    last = rounds[-1]["end_s"]
    unit, seconds = next((unit for unit in UNITS if last >= 2 * unit[1]), ("rounds", 0.0))
    ends = [one["end_s"] / seconds if seconds else number for number, one in enumerate(rounds, start=1)]
    megabytes = [sum(one["bytes_up"] + one["bytes_down"] for one in rounds[: at + 1]) / 1e6 for at in range(len(ends))]
    panels = (
        ("mean training loss (nats)", [one["loss"] for one in rounds], "#1b7f5c"),
        ("MB moved so far", megabytes, "#3f6fb5"),
        ("updates of the round", [one["updates"] for one in rounds], "#c8803c"),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        for axes, (label, values, colour) in zip(figure.subplots(3, sharex=True), panels, strict=True):
            points = [(x, y) for x, y in zip(ends, values, strict=True) if y is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], marker=".", color=colour)
            axes.set_ylabel(label)
        axes.set_xlabel(f"virtual {unit}" if seconds else unit)
        figure.savefig(path, format="svg", metadata={"Date": None})
