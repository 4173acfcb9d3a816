"""What was done for a run so far, as documents: a typed view of its steps in the journal."""

from collections.abc import Iterator
from typing import Any, TypeVar

from offsite.coordinator.bundles.manifests import Bundle
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.results import BUILD, STOP, Step, fold, realign, roster
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.journal import Journal
from offsite.kernels.schema import Tier
from offsite.protos.documents import parse, to_plain
from offsite.protos.events import Event
from offsite.protos.figures import without_infinities
from offsite.protos.spec import Span

R = TypeVar("R")

GRANT = Step("granted", Grant)


class History:
    """The steps of one run. A step that is done never changes, so what was read once is not read again."""

    def __init__(self, journal: Journal, run: str) -> None:
        self._journal, self._run = journal, run
        self._values = journal.steps(run)
        self._results: dict[str, Any] = {}

    def get(self, step: Step[R]) -> R | None:
        """Return what a step gave; None if it is not done. Raises InputError where another version wrote it."""
        return self[step] if step.name in self._values else None

    def __getitem__(self, step: Step[R]) -> R:
        if step.name not in self._results:
            value, _ = without_infinities(self._values[step.name])  # earlier versions kept NaN
            self._results[step.name] = parse(step.gives, value, where=f"step {step.name} of run {self._run}")
        result: R = self._results[step.name]
        return result

    def record(self, step: Step[R], result: R, *news: Event) -> R:
        """Keep what a step gave, with the events that tell it, in one transaction; the first result stands."""
        value = to_plain(result)
        self._values[step.name] = self._journal.add_step(self._run, step.name, value, *news)
        if self._values[step.name] == value:  # of many sites it takes long to read
            self._results[step.name] = result
        return self[step]

    def rounds(self, planned: int) -> int:
        """Return how many rounds the run has: those that were planned, or fewer where it has stopped."""
        stop = self.get(STOP)
        return stop.round if stop else planned

    def bundle(self, number: int) -> Bundle:
        """Return the bundle that sites train on in a round: re-aligned to the last, if the run asks for that."""
        aligned = (self.get(realign(at)) for at in range(number, 0, -1))
        return next((bundle for bundle in aligned if bundle is not None), self[BUILD])

    def version(self, number: int) -> Version:
        """Return what a round starts from."""
        return self[fold(number)].version if number else self[BUILD].version

    def tiers(self, number: int) -> dict[str, Tier]:
        """Return by site what it trains in a round, of those that were asked; earlier versions asked all of the run."""
        opened = self.get(roster(number + 1))
        return opened.tiers if opened else self[BUILD].tiers

    def members(self, number: int) -> dict[str, Tier]:
        """Return by site what it trains, of all that take part in a run before a round, counted from zero, opens."""
        before = [self.get(roster(at)) for at in range(1, number + 1)]
        return self[BUILD].tiers | {site: tier for one in before if one for site, tier in one.joined.items()}

    def opened(self) -> list[str]:
        """Return the steps that have opened rounds."""
        return [name for name in self._values if name.startswith("roster:")]

    def spans(self) -> Iterator[tuple[str, Span]]:
        """Yield (step, where its time went)."""
        for name, value in self._values.items():
            for span in value.get("spans", ()):
                yield name, parse(Span, span, where=f"step {name} of run {self._run}")
