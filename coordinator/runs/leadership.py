"""Which gateway dispatches: one of those that share a journal does, and when it is gone another takes over."""

import asyncio
import logging
from collections.abc import Callable

from offsite.coordinator.home import Home
from offsite.coordinator.retention import Retention, collect
from offsite.coordinator.runs.dispatch import Dispatcher
from offsite.coordinator.runs.executor import Executor
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.database import Unwritable
from offsite.coordinator.store.journal import Journal
from offsite.protos.errors import InputError, OffsiteError, ResourceError, UnreachableError

LOOK_S = 1.0  # whether the journal can be had, or is still this gateway's
AGAIN_S = 10.0  # after an executor that could not start; another gateway may take over meanwhile
COLLECT_EVERY_S = 6 * 3600.0

log = logging.getLogger(__name__)


class Leadership:
    """Starts supervisors, and collects what need not be kept, while this gateway holds the journal."""

    def __init__(
        self,
        home: Home,
        journal: Journal,
        changes: Changes,
        make_executor: Callable[[Home], Executor],
        *,
        name: str,
        places: int,
        retention: Retention,
    ) -> None:
        self._home, self._journal, self._changes = home, journal, changes
        self._make_executor, self._name, self._places, self._retention = make_executor, name, places, retention
        self._hold = journal.hold()
        self._executor: Executor | None = None
        self._jobs: list[asyncio.Task[None]] = []

    @property
    def leads(self) -> bool:
        """Whether this gateway dispatches."""
        return bool(self._jobs)

    async def begin(self) -> None:
        """Dispatch if no other gateway does; raises OffsiteError, as where the executor cannot start.

        `close` from another task ends it early.
        """
        if await asyncio.to_thread(self._hold.take):
            await self._take_up()

    async def work(self, moved: Callable[[bool], None]) -> None:
        """Take over when nobody dispatches, and step down when another does; `moved` is told whether this one does.

        Raises MismatchError when the journal is damaged.
        """
        while True:
            await asyncio.sleep(LOOK_S)
            for job in self._jobs:
                if job.done():
                    job.result()
            try:
                mine = await asyncio.to_thread(self._hold.take)
                if mine and not self.leads:
                    await self._take_up()
                    moved(True)
                elif self.leads and not mine:
                    await self._step_down()
                    moved(False)
            except Unwritable as error:  # nobody can take over now; the gateway says so
                log.debug("%s", error)
            except (InputError, ResourceError, UnreachableError) as error:
                log.error("this gateway cannot dispatch, another one may: %s", error)
                self._hold.close()
                await asyncio.sleep(AGAIN_S)

    async def _take_up(self) -> None:
        self._executor = self._make_executor(self._home)
        try:
            await asyncio.to_thread(self._executor.start)
            await asyncio.to_thread(self._journal.lead, self._name)
            dispatcher = await asyncio.to_thread(Dispatcher, self._journal, self._executor, places=self._places)
        except BaseException:
            self._executor.close()
            raise
        self._jobs = [asyncio.create_task(job) for job in (dispatcher.work(self._changes), self._collect())]

    async def _step_down(self) -> None:
        """Leave the runs to another gateway; supervisors that go on here find that out by themselves."""
        for job in self._jobs:
            job.cancel()
        self._jobs = []
        if self._executor is not None:
            await asyncio.to_thread(self._executor.close)

    async def _collect(self) -> None:
        """Remove what need not be kept, now and again every few hours."""
        while True:
            try:
                freed = await asyncio.to_thread(collect, self._home, self._retention)
                for lost in freed.lost:
                    log.error("a manifest is lost, and what it may have named is kept: %s", lost)
            except (OSError, OffsiteError) as error:  # of a damaged journal the dispatcher makes an end
                log.error("old files are not collected: %s", error)
            await asyncio.sleep(COLLECT_EVERY_S)

    def close(self) -> None:
        """End what was started, and let another gateway take over."""
        for job in self._jobs:
            job.cancel()
        if self._executor is not None:
            self._executor.close()
        self._hold.close()
