"""What a round asks of its sites, dealt out to workers in orders that are neither too long nor too large."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offsite.deploy.simulation.orders import Order
from offsite.kernels.schema import Tier

BATCH_BYTES = 4 << 20  # of an order's updates, which are in memory together, at most, if they are several


@dataclass(frozen=True)
class Asked:
    """Sites of one tier that are to train."""

    tier: Tier
    sites: Sequence[str]  # in the order of their names
    size: int  # bytes of an update
    alone: bool = False  # whether each trains another part of the adapter, so that no two updates lie together
    newest: Mapping[str, int] = field(default_factory=dict)  # where stages feed back: the round of a site's last update

    def order(self, begin: int, end: int) -> Order:
        """Return the order to some of them."""
        sites = tuple(self.sites[begin:end])
        return Order(tier=self.tier, sites=sites, previous=tuple(map(self.newest.get, sites)) if self.newest else ())


class Todo:
    """What is left of what is asked for; any thread may take some of it."""

    def __init__(self, asked: Sequence[Asked], *, workers: int) -> None:
        """Take it, and how many workers there are to begin with."""
        self._asked, self._workers = list(asked), workers
        self._at, self._out, self._over = 0, 0, False
        self._again: list[Order] = []  # of workers that were lost
        self._change = threading.Condition()

    def join(self) -> None:
        """Count one more worker."""
        with self._change:
            self._workers += 1

    def take(self, most: int) -> Order | None:
        """Return the order to the next sites: to so many at most, and to fewer where few are left for all workers.

        While others are at work on the last ones it waits, as those may be given back; None: all are done.
        """
        with self._change:
            while (order := self._next(most)) is None and self._out and not self._over:
                self._change.wait()
            self._out += order is not None
            return order

    def _next(self, most: int) -> Order | None:
        if self._over:
            return None
        if self._again:
            return self._again.pop()
        while self._asked and self._at == len(self._asked[0].sites):
            self._asked, self._at = self._asked[1:], 0
        if not self._asked:
            return None
        first, begin = self._asked[0], self._at
        share = (len(first.sites) - begin) // (2 * self._workers)
        self._at += 1 if first.alone else max(1, min(most, share, BATCH_BYTES // max(1, first.size)))
        return first.order(begin, self._at)

    def end(self) -> None:
        """Count an order as done."""
        with self._change:
            self._out -= 1
            self._change.notify_all()

    def give_back(self, order: Order) -> None:
        """Have others do the order of a worker that was lost."""
        with self._change:
            self._again.append(order)
            self._out, self._workers = self._out - 1, self._workers - 1
            self._change.notify_all()

    def clear(self) -> None:
        """Let nobody take any more, nor wait."""
        with self._change:
            self._over = True
            self._change.notify_all()
