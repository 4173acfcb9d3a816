"""Calls apart from the thread that asks: what they give, what they raise, and what an interrupt leaves of them."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from queue import Queue

import pytest

from offsite.client.apart import all_of, many, one
from offsite.client.cli import Interrupted
from offsite.protos.errors import UnreachableError


class Stream:
    """Counts up; says nothing more after `last` until it is cancelled."""

    def __init__(self, last: int) -> None:
        self._next, self._last, self.cancelled = 0, last, threading.Event()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        assert threading.current_thread() is not threading.main_thread()
        if self._next == self._last:
            self.cancelled.wait()
            raise StopIteration
        self._next += 1
        return self._next

    def cancel(self) -> None:
        self.cancelled.set()


def test_a_call_gives_and_raises_what_it_does_elsewhere() -> None:
    assert one(threading.current_thread) is not threading.main_thread()
    with pytest.raises(ZeroDivisionError):
        one(lambda: 1 // 0)
    assert list(many(lambda: iter_of([1, 2]))) == [1, 2]


def test_so_many_calls_are_under_way_at_once() -> None:
    both, made = threading.Barrier(2, timeout=10), []

    def call(number: int) -> None:
        both.wait()
        made.append(number)

    all_of((partial(call, number) for number in range(6)), most=2)
    assert sorted(made) == list(range(6))
    all_of([], most=2)


def test_after_a_call_that_fails_none_begins() -> None:
    made: list[int] = []
    failing: Queue[threading.Thread] = Queue()

    def call(number: int) -> None:
        made.append(number)
        if number == 1:
            failing.put(threading.current_thread())
            raise IndexError("the second")
        failing.get(timeout=10).join()

    with pytest.raises(IndexError, match="the second"):
        all_of([partial(call, number) for number in range(4)], most=2)
    assert sorted(made) == [0, 1]


def iter_of(numbers: list[int]) -> Stream:
    stream = Stream(len(numbers))
    stream.cancelled.set()
    return stream


def test_a_stream_that_is_no_longer_read_is_cancelled() -> None:
    stream = Stream(5)
    answers = many(lambda: stream)
    assert next(answers) == 1 and not stream.cancelled.is_set()
    answers.close()  # type: ignore[attr-defined]
    assert stream.cancelled.is_set()


def test_a_stream_that_says_nothing_for_too_long_is_given_up_and_one_that_goes_on_is_not() -> None:
    stream = Stream(3)
    answers = many(lambda: stream, stall_s=0.1)
    assert [next(answers) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UnreachableError, match="the coordinator has sent nothing for 0 s"):
        next(answers)
    assert stream.cancelled.is_set()


def test_an_interrupt_while_waiting_is_raised_and_ends_the_stream() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    stream = Stream(0)
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGUSR1])
    try:
        timer.start()
        with pytest.raises(Interrupted):
            list(many(lambda: stream))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stream.cancelled.is_set()


def test_a_stream_that_an_error_leaves_open_does_not_keep_python_from_ending() -> None:
    program = "\n".join(
        (
            "from offsite.client.apart import many",
            "class Stream:",
            "    def __iter__(self):",
            "        while True: yield 1",
            "    def cancel(self): print('cancelled', flush=True)",
            "def work():",
            "    answers = many(Stream)",
            "    next(answers)",
            "    raise SystemError",
            "work()",
        )
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "cancelled\n")
