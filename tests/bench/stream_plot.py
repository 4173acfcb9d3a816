"""The table and the plot of docs/memory.md, of what tests/bench/stream.py has written.

python tests/bench/stream_plot.py OUTCOME.json ... --svg docs/stream.svg
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
from matplotlib.figure import Figure

from offsite.client.report import STYLE

ROWS = {  # arm, and what serves -> how it is called, its colour
    ("lora", "online"): ("LoRA, no memory", "#8c96a3"),
    ("lora", "ensemble"): ("LoRA, lae: both", "#1b7f5c"),
    ("lora", "offline"): ("LoRA, lae: offline", "#7fb89f"),
    ("factor-mean", "adapter"): ("LoRA, factor-mean, no memory", "#8fb0d8"),
    ("ewc", "adapter"): ("LoRA, factor-mean, ewc", "#3f6fb5"),
    ("replay", "adapter"): ("LoRA, replay", "#e0b37a"),
    ("grown", "served"): ("LoRA, grown", "#5a4a78"),
    ("mos", "adapter"): ("MoS, no memory", "#b5473f"),
    ("shards", "served"): ("MoS, shard-store(c=2)", "#c58bc0"),
    ("frozen-shards", "served"): ("MoS, shard-store(c=0)", "#9b7bb8"),
}
FIGURES = ("forgotten", "newest", "end")


def main() -> None:
    """Print the table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--svg", type=Path, required=True)
    given = parser.parse_args()
    measured: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(dict)
    for file in given.files:
        for one in json.loads(file.read_text())["outcome"]:
            serves = one["serves"] if one["serves"] in ("online", "offline", "ensemble", "served") else "adapter"
            measured[one["arm"], serves][one["seed"]] = {name: one[name] for name in FIGURES}
    plain = measured["lora", "online"]
    print("| what serves | forgotten | of LoRA's | loss of the newest | of LoRA's | of all three at the end |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in (row for row in ROWS if row in measured):
        seeds = measured[row]
        cells = {name: spread([seeds[seed][name] for seed in sorted(seeds)]) for name in FIGURES}
        shares = {
            name: fmean(one[name] for one in seeds.values()) / fmean(plain[seed][name] for seed in seeds)
            for name in FIGURES
        }
        print(
            f"| {ROWS[row][0]} | {cells['forgotten']} | {shares['forgotten']:.2f} | {cells['newest']} | "
            f"{shares['newest']:.2f} | {cells['end']} |"
        )
    draw(measured, given.svg)


def spread(values: list[float]) -> str:
    """Return a mean, and the standard deviation of the sample."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def draw(measured: dict[tuple[str, str], dict[int, dict[str, float]]], path: Path) -> None:
    """Draw what is forgotten over what the newest task comes to: a point a seed, and their mean."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        for row, (name, colour) in ROWS.items():
            points = [(one["newest"], one["forgotten"]) for one in measured.get(row, {}).values()]
            if not points:
                continue
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.5, linewidths=0)
            mean = [math.fsum(axis) / len(points) for axis in zip(*points, strict=True)]
            axes.scatter(*mean, s=70, color=colour, label=name, linewidths=0)
        axes.axhline(0, color="#d5dbe2", linewidth=1, zorder=0)
        axes.set_xlabel("loss of the newest task (nats a token)")
        axes.set_ylabel("forgotten of earlier tasks (nats a token)")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
