"""What a gateway counts of its work. This meter counts nothing; `metrics.py` has the one that is asked for."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from offsite.coordinator.home import Home
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.journal import Journal
from offsite.protos.addresses import Address, parse
from offsite.protos.extras import extra


@dataclass(frozen=True)
class Gauged:
    """What a meter looks at by itself."""

    home: Home
    journal: Journal
    blobs: Blobs
    waiting: Callable[[], int]  # sites that wait for a task at this gateway
    leads: Callable[[], bool]  # whether it dispatches


class Meter:
    """Counts nothing."""

    address: Address | None = None  # where it can be asked

    def sent(self, size: int) -> None:
        """Count bytes of files that were sent."""

    def received(self, size: int) -> None:
        """Count bytes of updates that were received."""

    @contextmanager
    def upload(self) -> Iterator[None]:
        """Count an upload as what becomes of it."""
        yield

    def begin(self, gauged: Gauged) -> None:
        """Begin: the gateway serves."""

    async def work(self) -> None:
        """Look how long the event loop is busy, again and again."""
        await asyncio.Event().wait()

    def end(self) -> None:
        """End: the gateway serves no more."""


def meter_at(address: str) -> Meter:
    """Return a meter that can be asked at HOST:PORT, and one that counts nothing where none is given."""
    if not address:
        return Meter()
    with extra("metrics", option="--metrics"):
        from offsite.coordinator.service.metrics import Metrics
    return Metrics(parse(address, listening=True))
