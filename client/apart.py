"""Calls in threads of their own, waited for in plain Python.

A signal's exception is raised wherever the main thread is just then. Amid gRPC's compiled code it can get lost, crash
the process, or leave a channel whose end never comes; while one waits for a thread it does no harm.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any

from offsite.protos.errors import UnreachableError

LOOK_S = 0.2
AHEAD = 4  # answers of a stream that wait to be taken
_END = object()


def one(call: Callable[[], Any]) -> Any:
    """Return what a call gives, or raise what it raises."""
    outcome = _begin(call)
    _wait([outcome])
    return outcome.result()


def all_of(calls: Iterable[Callable[[], None]], *, most: int) -> None:
    """Make calls, at most so many at a time; raises what one of them raises, and begins none after that."""
    left = deque(calls)

    def take() -> Callable[[], None] | None:
        try:
            return left.popleft()
        except IndexError:
            return None

    def work() -> None:
        try:
            for call in iter(take, None):
                call()
        except BaseException:
            left.clear()
            raise

    outcomes = [_begin(work) for _ in range(min(most, len(left)))]
    try:
        _wait(outcomes)
    finally:
        left.clear()  # of an interrupt: what is under way ends with its channel
    for outcome in outcomes:
        outcome.result()


def many(call: Callable[[], Any], *, stall_s: float | None = None) -> Iterator[Any]:
    """Yield the answers of a streaming call, or raise what it raises; one that is no longer read is cancelled.

    Raises UnreachableError when none comes for `stall_s`.
    """
    stream, over = one(call), threading.Event()
    answers: Queue[Any] = Queue(AHEAD)

    def pump() -> None:
        try:
            for answer in stream:
                _put(answers, answer, over)
            _put(answers, _END, over)
        except BaseException as error:
            _put(answers, _Raised(error), over)

    threading.Thread(target=pump, daemon=True).start()
    try:
        while (answer := _get(answers, stall_s)) is not _END:
            if isinstance(answer, _Raised):
                raise answer.error
            yield answer
    finally:
        over.set()
        if sys.is_finalizing():  # of a stream that was left open: no thread can begin any more
            stream.cancel()
        else:
            one(stream.cancel)


def _begin(call: Callable[[], Any]) -> Future[Any]:
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return outcome


def _wait(outcomes: Sequence[Future[Any]]) -> None:
    while wait(outcomes, timeout=LOOK_S).not_done:  # a signal that another thread gets wakes no wait without an end
        continue


class _Raised:
    """What a stream ended with."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _put(answers: Queue[Any], answer: Any, over: threading.Event) -> None:
    while not over.is_set():
        with suppress(Full):
            return answers.put(answer, timeout=LOOK_S)


def _get(answers: Queue[Any], stall_s: float | None) -> Any:
    since = time.monotonic()
    while stall_s is None or time.monotonic() - since < stall_s:
        with suppress(Empty):
            return answers.get(timeout=LOOK_S)
    raise UnreachableError(f"the coordinator has sent nothing for {stall_s:.0f} s")
