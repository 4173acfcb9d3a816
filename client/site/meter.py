"""What a site's agent counts of its work. This meter counts nothing; `metrics.py` has the one that is asked for."""

from typing import Any

from offsite.protos.addresses import Address, parse
from offsite.protos.extras import extra


class Meter:
    """Counts nothing."""

    address: Address | None = None  # where it can be asked

    def state(self, name: str) -> None:
        """Note what the agent is at."""

    def received(self, size: int) -> None:
        """Count bytes that were downloaded."""

    def met(self) -> None:
        """Note that the coordinator has answered."""

    def event(self, kind: str, data: dict[str, Any]) -> None:
        """Count what the agent says."""


def meter_at(address: str) -> Meter:
    """Return a meter that can be asked at HOST:PORT, and one that counts nothing where none is given."""
    if not address:
        return Meter()
    with extra("metrics", option="--metrics"):
        from offsite.client.site.metrics import Metrics
    return Metrics(parse(address, listening=True))
