"""Where a step's time went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from offsite.protos.spec import Span


class Timeline(list[Span]):
    """The spans of one step."""

    @contextmanager
    def span(self, kind: Any) -> Iterator[None]:
        """Record a stretch of time of one kind."""
        start = time.time()
        yield
        self.append(Span(kind=kind, start=start, end=time.time()))
