"""Calls in threads of their own, waited for in plain Python.

A signal's exception is raised wherever the main thread is just then. Amid gRPC's compiled code it can get lost, crash
the process, or leave a channel whose end never comes; while one waits for a thread it does no harm.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

LOOK_S = 0.2
_END = object()


def one(call: Callable[[], Any]) -> Any:
    """Return what a call gives, or raise what it raises."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    while not wait([outcome], timeout=LOOK_S).done:  # a signal that another thread gets wakes no wait without an end
        continue
    return outcome.result()


def many(call: Callable[[], Any]) -> Iterator[Any]:
    """Yield the answers of a streaming call, or raise what it raises; one that is no longer read is cancelled."""
    stream = one(call)
    try:
        while (answer := one(lambda: next(stream, _END))) is not _END:
            yield answer
    finally:
        one(stream.cancel)
