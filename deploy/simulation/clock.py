"""The virtual clock: who would have sent an update by when, by a live round's own rules of who is waited for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from random import Random

from offsite.coordinator.runs import quorum
from offsite.coordinator.runs.rounds import ATTEMPTS, FOREVER
from offsite.deploy.simulation.world import Nature, World, natures
from offsite.protos.spec import RunSpec


@dataclass(frozen=True)
class Load:
    """What a task asks of a site: bytes each way, and steps."""

    down: int
    steps: int
    up: int


@dataclass(frozen=True)
class Visit:
    """How a site's task ended, when, and in which attempt."""

    state: str  # "uploaded", or as a live task that gave no update: "failed", "stalled" or "late"
    at: float
    attempt: int = 0
    message: str = ""


class Presence:
    """When a site is there; asked about times that hardly ever go back."""

    def __init__(self, nature: Nature, world: World, key: str) -> None:
        self._sessions = self._all(nature, world, key)
        self._known: list[tuple[float, float]] = []

    def _all(self, nature: Nature, world: World, key: str) -> Iterator[tuple[float, float]]:
        """Yield (begin, end) of each session, in order."""
        if nature.sessions is not None:
            lap = 0
            while nature.sessions and (not lap or world.period_s):
                shift = lap * (world.period_s or 0.0)
                yield from ((begin + shift, end + shift) for begin, end in nature.sessions)
                lap += 1
            return
        if world.available == 1:
            yield 0.0, FOREVER
            return
        away_s = world.session_s * (1 - world.available) / world.available
        first = Random(key)  # of each draw a new one: the state of one is 2.5 kB, and there are many sites
        at = 0.0 if first.random() < world.available else first.expovariate(1 / away_s)
        for number in count():  # both are without memory, so that the first round begins at any moment of the day
            random = Random(f"{key} {number}")
            end = at + random.expovariate(1 / world.session_s)
            yield at, end
            at = end + random.expovariate(1 / away_s)

    def forget(self, before: float) -> None:
        """Let go of what ended before a time that will not be asked about again."""
        self._known = [session for session in self._known if session[1] > before]

    def since(self, at: float) -> Iterator[tuple[float, float]]:
        """Yield the sessions from a time on, the first cut where it begins earlier."""
        number = 0
        while True:
            if number == len(self._known):
                following = next(self._sessions, None)
                if following is None:
                    return
                self._known.append(following)
            begin, end = self._known[number]
            number += 1
            if end > at:
                yield max(begin, at), end


class Clock:
    """Virtual seconds since the first round began. Without a world they stand still, and everybody is there."""

    def __init__(self, world: World | None, spec: RunSpec, seed: int) -> None:
        """Take what sites are like, and whom the run waits for how long."""
        self._world, self._spec, self._seed = world, spec, seed
        self._nature = natures(world, seed) if world else None
        self._presence: dict[str, Presence] = {}
        self.now = 0.0

    def round(self, number: int, loads: Mapping[str, Load]) -> dict[str, Visit]:
        """Let a round pass: tell how the task of each site ends. It is over when nobody is waited for any more."""
        visits = {site: self._visit(number, site, load) for site, load in loads.items()}
        end = self._end(visits)
        visits = {
            site: visit if visit.at <= end else Visit("late", end, visit.attempt, quorum.WITHOUT)
            for site, visit in visits.items()
        }
        self.now = max((visit.at for visit in visits.values()), default=self.now)
        return visits

    def _end(self, visits: Mapping[str, Visit]) -> float:
        """Return when a round closes though some are still at it."""
        rule, came = quorum.of(self._spec), sorted(one.at for one in visits.values() if one.state == "uploaded")
        return rule.end(self.now, came[rule.updates - 1]) if rule and rule.updates <= len(came) else FOREVER

    def _visit(self, number: int, site: str, load: Load) -> Visit:
        if self._nature is None or self._world is None:
            return Visit("uploaded", self.now)
        nature, draw = self._nature(site), Random(f"{self._seed} round {number} {site}")
        if site not in self._presence:
            self._presence[site] = Presence(nature, self._world, f"{self._seed} presence {site}")
        presence = self._presence[site]
        presence.forget(self.now)
        at, taken = self.now, None
        needed = load.down / nature.down + load.steps / nature.steps_per_s + load.up / nature.up
        for attempt in range(ATTEMPTS):
            gives_up = draw.random() < nature.dropout
            left, stalled = needed * (draw.random() if gives_up else 1.0), None
            first, left_at, end = _work(presence, at, left, self._spec.stall_s)
            taken = first if taken is None else taken
            late = FOREVER if taken is None else taken + self._spec.task_s
            if end is None or end > late:
                stalled = min(left_at + self._spec.stall_s if end is None else FOREVER, late)
                why = f"was not done {self._spec.task_s:.0f} s after it took its task"
                gone = f"got no further for {self._spec.stall_s:.0f} s"
                return Visit("stalled", stalled, attempt, why if stalled == late else gone)
            if not gives_up:
                return Visit("uploaded", end, attempt)
            at = end
        return Visit("failed", at, ATTEMPTS - 1, f"gave up {ATTEMPTS} times")


def _work(presence: Presence, at: float, needed: float, stall_s: float) -> tuple[float | None, float, float | None]:
    """Return when a site takes a task that is offered, when it was last heard of, and when it is done with it.

    It works while it is there, and goes on when it comes back, unless it was away for too long.
    """
    taken, heard = None, at
    for begin, end in presence.since(at):
        if begin - heard > stall_s:
            break
        taken = begin if taken is None else taken
        if needed <= end - begin:
            return taken, begin + needed, begin + needed
        needed -= end - begin
        heard = end
    return taken, heard, None
