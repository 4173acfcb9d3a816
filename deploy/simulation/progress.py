"""How far a simulation is, for people at a terminal, and what became of its rounds."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from offsite.deploy.simulation.data import Data

EVERY_S = 10.0  # a line, where the output is no terminal
MOST = 20  # rounds that are shown one by one


class Progress:
    """A bar for the round that trains; where the output is no terminal, a line now and then."""

    def __init__(self, console: Console, *, rounds: int) -> None:
        """Take where to show it."""
        self._console, self._rounds = console, rounds
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("sites"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bar: TaskID | None = None
        self._number, self._said = -1, 0.0

    def __enter__(self) -> Self:
        """Show it."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        self._bars.stop()

    def begin(self, data: Data) -> None:
        """Say what data the sites have."""
        counts = data.counts
        if counts is None:
            self._console.print(f"{len(data.names):,} sites, each with a file or folder of its own")
            return
        middle, most = sorted(counts)[len(counts) // 2], max(counts)
        self._console.print(
            f"{len(counts):,} sites, {sum(counts):,} rows: {min(counts):,} to {most:,} at a site, median {middle:,}"
        )

    def note(self, words: str) -> None:
        """Say what happened meanwhile."""
        self._console.print(words, soft_wrap=True, markup=False)

    def tell(self, number: int, done: int, total: int) -> None:
        """Show how many sites of a round are done."""
        what = f"round {number + 1} of {self._rounds}"
        if number != self._number:
            self._number, self._said = number, time.monotonic()
            if self._bar is not None:
                self._bars.remove_task(self._bar)
            self._bar = self._bars.add_task(what, total=total)
        if self._bar is not None:
            self._bars.update(self._bar, completed=done)
        if not self._console.is_terminal and time.monotonic() - self._said > EVERY_S:
            self._said = time.monotonic()
            self._console.print(f"{what}: {done:,} of {total:,} sites")

    def lines(self, simulation: dict[str, Any]) -> list[str]:
        """Say what became of each round."""
        rounds = simulation["rounds"]
        lines = [
            f"round {number}: {one['updates']:,} of {one['asked']:,} sites sent an update{_absent(one)}{_when(one)}, "
            f"{one['users_per_s']:,.0f} sites a second here"
            for number, one in enumerate(rounds, start=1)
        ]
        return lines if len(lines) <= MOST else [*lines[: MOST // 2], "...", *lines[-MOST // 2 :]]


def _absent(one: dict[str, Any]) -> str:
    kinds = [f"{one[kind]:,} {kind}" for kind in ("stalled", "late", "failed", "refused") if one[kind]]
    return f" ({', '.join(kinds)})" if kinds else ""


def _when(one: dict[str, Any]) -> str:
    return f", from {one['begin_s']:,.0f} to {one['end_s']:,.0f} virtual seconds" if one["end_s"] else ""
