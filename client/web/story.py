"""What the page knows of a run: built up from its events in a thread of its own, once for all who look."""

import math
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from offsite.client.answers import Event, Version
from offsite.client.forgetting import Forgetting
from offsite.client.progress import RunView
from offsite.client.session import Run, Session
from offsite.protos.documents import plain
from offsite.protos.errors import InputError, OffsiteError
from offsite.protos.events import (
    Cancelled,
    Completed,
    EmulatorBuilt,
    Failed,
    Held,
    Measured,
    Released,
    RoundBegun,
    RoundDone,
    Selected,
    SiteOut,
    SiteState,
    Stopped,
    UpdateAccepted,
    Warned,
    Withdrawn,
)
from offsite.protos.figures import Score

LINES = 200  # of the log that are kept
ENTRIES = 500  # of the audit trail
STATUS_S = 1.0  # between two questions how a run stands
LINEAGE_S = 10.0  # and for its versions, for which the coordinator reads all of it
OVER = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Line:
    """A line of the log or of the audit trail; `at` is in seconds since the epoch."""

    at: float
    who: str
    text: str


@dataclass
class RoundView:
    """What is known of a round."""

    losses: dict[str, float] = field(default_factory=dict)  # by the site whose update is kept: mean over the round
    down: dict[str, int] = field(default_factory=dict)  # bytes by site
    up: int = 0  # bytes
    averaged: int = 0  # updates; 0: it is not over
    at: float = 0.0  # when it was over

    @property
    def spread(self) -> tuple[float, float, float]:
        """The losses' twentieth from below, middle and twentieth from above."""
        ranked = sorted(self.losses.values())
        low, middle, high = (ranked[round(share * (len(ranked) - 1))] for share in (0.05, 0.5, 0.95))
        return low, middle, high


@dataclass
class Story(RunView):
    """A run's view, and beside it what came before: rounds, figures, log and audit trail."""

    rounds: dict[int, RoundView] = field(default_factory=dict)
    steps: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # (round, loss) of the round under way
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)  # by figure, by held-out set
    log: deque[Line] = field(default_factory=lambda: deque(maxlen=LINES))
    audit: deque[Line] = field(default_factory=lambda: deque(maxlen=ENTRIES))
    turns: int = 0  # of the lineage: versions that came, or were taken back

    def take(self, event: Event) -> str:
        """Add an event; return a line that tells it."""
        line = super().take(event)
        if line:
            self.log.append(Line(event.at, event.site, line))
        return line

    def _round(self, number: int) -> RoundView:
        return self.rounds.setdefault(number, RoundView())

    def _note(self, who: str, text: str) -> str:
        self.audit.append(Line(self.now, plain(who, most=64), plain(text)))
        return text

    def _on_selected(self, event: Selected) -> str:
        super()._on_selected(event)
        return self._note("coordinator", f"chose the sites {', '.join(event.sites)}")

    def _on_bundle(self, event: EmulatorBuilt) -> str:
        return self._note("coordinator", super()._on_bundle(event))

    def _on_figure(self, event: Measured) -> str:
        self.scores[event.name] = event.sets
        return super()._on_figure(event)

    def _on_warning(self, event: Warned) -> str:
        return self._note("coordinator", super()._on_warning(event))

    def _on_begun(self, event: RoundBegun) -> str:
        line = super()._on_begun(event)
        return self._note("coordinator", line) if line else ""

    def _on_out(self, event: SiteOut) -> str:
        return self._note(event.by, super()._on_out(event))

    def _on_site(self, event: SiteState) -> str:
        line = super()._on_site(event)
        down = self._round(event.round).down
        down[event.site] = max(down.get(event.site, 0), event.bytes_down)
        if event.state == "training" and event.step and event.loss is not None:
            at = event.round - 1 + event.step / max(1, event.steps)
            self.steps.setdefault(event.site, []).append((at, event.loss))
        elif event.state in ("refused", "failed", "stalled", "left out", "late", "folded"):
            self._note(event.site, line)
        return line

    def _on_update(self, event: UpdateAccepted) -> str:
        one = self._round(event.round)
        one.losses[event.site], one.up = event.loss, one.up + event.bytes
        return super()._on_update(event)

    def _on_round(self, event: RoundDone) -> str:
        one = self._round(event.round)
        one.averaged, one.at = event.sites, self.now
        self.steps.clear()
        self.turns += 1
        return super()._on_round(event)

    def _on_stopped(self, event: Stopped) -> str:
        return self._note("coordinator", super()._on_stopped(event))

    def _on_held(self, event: Held) -> str:
        return self._note("coordinator", super()._on_held(event))

    def _on_released(self, event: Released) -> str:
        line = super()._on_released(event)
        self.turns += 1
        what = f"the version of round {event.round}" if event.round else "all of the run"
        self._note(event.by, f"released {what}: {event.reason}")
        return line

    def _on_withdrawn(self, event: Withdrawn) -> str:
        line = super()._on_withdrawn(event)
        self.turns += 1
        self._note(event.by, f"took back the version of round {event.round}: {event.reason}")
        return line

    def _on_completed(self, event: Completed) -> str:
        return self._note("coordinator", "the run is completed")

    def _on_failed(self, event: Failed) -> str:
        return self._note("coordinator", f"the run failed: {event.error}")

    def _on_cancelled(self, event: Cancelled) -> str:
        return self._note("coordinator", event.error)


class Follower:
    """Follows one run to its end, for all who look at it. `lock` holds while its story is read."""

    def __init__(self, session: Session, id: str) -> None:
        self._session, self._run = session, session.run(id)
        self.spec = self._run.spec
        self.story, self.lock = Story(self.spec), threading.Lock()
        self.fault = ""  # why it follows no longer
        self.closed = False
        self._asked, self._asking = time.monotonic(), threading.Lock()
        self._lineage: tuple[int, list[Version]] = (-1, [])
        self._listed, self._reading = -math.inf, threading.Lock()  # which no first look at a page waits for
        self._forgetting: Forgetting | None = None
        self._compared = False
        threading.Thread(target=self._follow, args=(session.run(id),), daemon=True, name=f"run {id}").start()

    def _follow(self, run: Run) -> None:
        try:
            for event in run.watch():
                if self.closed:
                    return
                with self.lock:
                    self.story.take(event)
        except OffsiteError as error:
            self.fault = str(error)

    def look(self) -> Run:
        """Return how the run stands, which is asked again where the last answer is old and may have changed."""
        with self._asking:
            if self._run.state not in OVER and time.monotonic() - self._asked > STATUS_S:
                self._run.refresh()
                self._asked = time.monotonic()
            return self._run

    def turn(self) -> None:
        """Have the versions asked for again: what takes one back is no event of a run that is over."""
        with self.lock:
            self.story.turns += 1
        self._listed = -math.inf

    def versions(self) -> list[Version]:
        """Return the run's versions after those that it went on from."""
        turns = self.story.turns
        with self._reading:
            if turns != self._lineage[0] and time.monotonic() - self._listed > LINEAGE_S:
                self._lineage, self._listed = (turns, self._session.versions(self._run.id)), time.monotonic()
            return self._lineage[1]

    def forgetting(self) -> Forgetting | None:
        """Return what the stream of a completed run has learned and forgotten; None where there is nothing to tell."""
        with self._reading:
            if not self._compared and self.spec.task and self._run.state == "completed":
                self._compared = True
                with suppress(InputError):  # measured on no set of a task
                    self._forgetting = self._session.forgetting(self._run)
            return self._forgetting
