"""What one caller may take of the coordinator: the size of a request, calls a second, calls and transfers at once.

State is kept for certificates that passed the gate only, and let go once they have been idle for a while.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from google.protobuf.message import Message

from offsite.protos.errors import InputError, ResourceError
from offsite.protos.ranges import AMOUNT

RATE, BURST = 50.0, 200.0  # calls a second of one certificate in the long run, and at once after a rest
REST_S = BURST / RATE  # after which a caller may do at once what a new one may
CALLS = 32  # of one certificate in progress: a poll, a heartbeat and a transfer, or as many watched runs
TRANSFERS = 4  # of one certificate in progress: two, and what the network has not yet told to be broken
ALL_TRANSFERS = 64  # each holds up to three chunks of a mebibyte for a reader that stalls

# Characters or bytes of a request's fields; one that is not named here has at most NAME.
NAME = 128
LENGTHS = {
    "version": 200,
    "metrics": 4 << 20,
    "spec": 1 << 20,
    "data": 1 << 20,
    "held": 1 << 20,
    "request": 2048,
    "revocations": 5 << 20,
}


def check_request(request: Message) -> None:
    """Refuse a request with a text, a number or a chunk beyond its range; raises InputError."""
    for field, value in request.ListFields():
        if isinstance(value, Message):
            check_request(value)
        elif isinstance(value, str | bytes):
            if len(value) > (most := LENGTHS.get(field.name, NAME)):
                raise InputError(f"{field.name}: {len(value)} characters came, at most {most} are taken")
        elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= AMOUNT):
            raise InputError(f"{field.name}: {value} is beyond the range of what is taken")


@dataclass
class _Taken:
    """What one certificate takes."""

    tokens: float
    at: float
    calls: int = 0
    transfers: int = 0


class Limits:
    """Counts what each certificate takes; raises ResourceError, which callers take as "wait and ask again"."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._taken: dict[int, _Taken] = {}
        self._swept = clock()
        self._transfers = 0

    def __len__(self) -> int:
        """Return of how many certificates there is state."""
        return len(self._taken)

    @contextmanager
    def call(self, serial: int) -> Iterator[None]:
        """Count one call of a certificate for as long as the body runs."""
        taken = self._caller(serial)
        now = self._clock()
        taken.tokens, taken.at = min(BURST, taken.tokens + RATE * (now - taken.at)), now
        if taken.tokens < 1:
            raise ResourceError(f"this certificate makes more than {RATE:.0f} calls a second; wait and ask again")
        taken.tokens -= 1
        if taken.calls >= CALLS:
            raise ResourceError(f"this certificate has {CALLS} calls in progress, which is all it may; end one first")
        taken.calls += 1
        try:
            yield
        finally:
            taken.calls -= 1

    @contextmanager
    def transfer(self, serial: int) -> Iterator[None]:
        """Count one upload or download, inside its call."""
        taken = self._taken[serial]
        if taken.transfers >= TRANSFERS:
            raise ResourceError(f"this certificate has {TRANSFERS} transfers in progress; wait until one ends")
        if self._transfers >= ALL_TRANSFERS:
            raise ResourceError(f"the coordinator has {ALL_TRANSFERS} transfers in progress; wait and ask again")
        taken.transfers += 1
        self._transfers += 1
        try:
            yield
        finally:
            taken.transfers -= 1
            self._transfers -= 1

    def _caller(self, serial: int) -> _Taken:
        now = self._clock()
        if now - self._swept > REST_S:
            self._swept = now
            rested = [key for key, one in self._taken.items() if not one.calls and now - one.at > REST_S]
            for key in rested:
                del self._taken[key]
        if serial not in self._taken:
            self._taken[serial] = _Taken(tokens=BURST, at=now)
        return self._taken[serial]
