"""Rehearsal: rows of earlier tasks, which a site has kept for itself, are among those that it trains on."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, TypeVar

from offsite.emulator.retention.base import Unanchored

T = TypeVar("T")
MOST_ROWS = 100_000


@dataclass(frozen=True)
class Replay(Unanchored):
    """Keep `rows` of each task, and fill a `share` of each batch of later ones with them (arXiv 1902.10486).

    What a site keeps is a uniform sample of its own rows, by a reservoir (Vitter, ACM TOMS 11, 1985). It never leaves
    the site, and a site's policy says how many rows may be kept. The first task, of which nothing is kept yet, trains
    as it would without.
    """

    rows: int = 64
    share: float = 0.25

    name: ClassVar[str] = "replay"
    paper: ClassVar[str] = "arXiv 1902.10486"
    active: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.rows <= MOST_ROWS or not 0 < self.share < 1:
            raise ValueError(
                f"rows must be in 1..{MOST_ROWS} and share above 0 and below 1, got {self.rows} and {self.share}"
            )

    def sample(self, rows: Iterable[T], *, seed: int) -> list[T]:
        """See `base.Rehearsing`: row n takes the place of one that is kept with a chance of `rows` / n."""
        random, kept = Random(f"{seed} reservoir"), list[T]()
        for number, row in enumerate(rows):
            if number < self.rows:
                kept.append(row)
            elif (place := random.randrange(number + 1)) < self.rows:
                kept[place] = row
        return kept

    def rehearsed(self, batch_size: int) -> int:
        """See `base.Rehearsing`: one at least, and never all."""
        return min(max(round(self.share * batch_size), 1), batch_size - 1)
