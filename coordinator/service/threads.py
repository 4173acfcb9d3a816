"""Calls of the journal off the event loop: in threads of their own, and those that come in a burst together."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Generic, ParamSpec, TypeVar

from offsite.protos.errors import OffsiteError

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")

# Not asyncio's own threads: updates are hashed and checked there, which takes long, and a list must not wait for that.
_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="journal")


async def in_thread(call: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Make a short call that may wait for a disk."""
    there = partial(copy_context().run, call, *args, **kwargs)  # with what is logged of it
    return await asyncio.get_running_loop().run_in_executor(_threads, there)


class Batch(Generic[Item, Result]):
    """Makes one call for all that came while the last one was under way: a burst costs a few transactions."""

    def __init__(self, call: Callable[[list[Item]], list[Result]]) -> None:
        self._call = call
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._work: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """Return what the call gave for an item, or raise what it raised."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._work is None:
            self._work = asyncio.create_task(self._empty())
        return await future

    async def _empty(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            await self._answer(batch)
        self._work = None

    async def _answer(self, batch: list[tuple[Item, "asyncio.Future[Result]"]]) -> None:
        try:
            results = await in_thread(self._call, [item for item, _ in batch])
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, OffsiteError):  # one item's fault is not the others'
                for one in batch:
                    await self._answer([one])
                return
            for _, future in batch:
                if not future.done():  # else its caller has gone
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
