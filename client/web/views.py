"""What the pages show, asked for through the SDK. These calls block, and are made in threads."""

import math
import threading
import time
import tomllib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import tomli_w

from offsite.client.answers import Site, Version
from offsite.client.figures import moved
from offsite.client.session import Run, Session
from offsite.client.web import plots
from offsite.client.web.story import OVER, Follower
from offsite.protos.documents import parse, to_plain
from offsite.protos.errors import InputError, MismatchError
from offsite.protos.figures import FIGURES, perplexity
from offsite.protos.spec import RunSpec

T = TypeVar("T")

FOLLOWED = 16  # runs at once; a coordinator lets one certificate make 32 calls
LISTED = 50  # runs, unless more are asked for
ROUNDS = 50  # of a table, the newest
SITES_S = 2.0  # between two questions for the sites
VERSIONS_S = 10.0  # and for the versions, each of which the coordinator reads from a whole run
STARTER = """\
model = ""        # a name of the owner's policy; an owner may give a path
name = ""
rounds = 1
public = ""       # at the coordinator: public text to tune the emulator on

[training]
steps = 20

[evaluation]      # at the coordinator: held-out examples, by name
"""


class Recent(Generic[T]):
    """An answer that is asked for again when it is older than so many seconds."""

    def __init__(self, ask: Callable[[], T], *, every_s: float) -> None:
        self._ask, self._every_s, self._lock = ask, every_s, threading.Lock()
        self._at = -math.inf
        self.last: T | None = None

    def __call__(self) -> T:
        """Return the answer; raises what asking for it raises."""
        with self._lock:
            if time.monotonic() - self._at > self._every_s or self.last is None:
                self.last, self._at = self._ask(), time.monotonic()
            return self.last


class Views:
    """A session, and the runs that are followed."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._followers: OrderedDict[str, Follower] = OrderedDict()
        self._lock = threading.Lock()
        self._sites: Recent[list[Site]] = Recent(session.sites, every_s=SITES_S)
        self._versions: Recent[list[Version]] = Recent(session.versions, every_s=VERSIONS_S)

    @property
    def reader(self) -> dict[str, Any]:
        """Who the page speaks as, and with whom."""
        who = self.session.identity
        return {"name": who.name, "role": who.role, "target": self.session.target}

    def follower(self, id: str) -> Follower:
        """Return who follows a run, the one there is or a new one; raises NotFoundError."""
        with self._lock:
            follower = self._followers.pop(id, None)
            if follower is None or follower.fault:
                follower = Follower(self.session, id)
            self._followers[id] = follower
            if len(self._followers) > FOLLOWED:
                self._followers.popitem(last=False)[1].closed = True
            return follower

    def overview(self, limit: int, *, whole: bool = True) -> dict[str, Any]:
        """The newest runs, and the sites; these and all others are without what takes long unless they are `whole`."""
        runs = self.session.runs(limit=limit)[::-1]
        busy: dict[str, tuple[str, str]] = {}
        for run in [run for run in runs if run.state == "running"][: FOLLOWED // 2]:
            follower = self.follower(run.id)
            with follower.lock:
                busy |= {name: (site.state, run.id) for name, site in follower.story.sites.items()}
        shown = {"runs": [run.status for run in runs], "limit": limit, "sites": self._sites(), "busy": busy}
        return {"lock": nullcontext()} | shown | self._now()

    def run(self, id: str, *, whole: bool = True) -> dict[str, Any]:
        """All of a run; `lock` is to be held while a template reads it."""
        follower = self.follower(id)
        run, story = follower.look(), follower.story
        seen = {site.name: site.seen_at for site in self._sites()}
        versions, forgetting = (follower.versions(), follower.forgetting()) if whole else ([], None)
        with follower.lock:
            drawn = [plot(story) for plot in (plots.losses, plots.figures, plots.traffic)]
            rounds = sorted(story.rounds.items(), reverse=True)
            return {
                "lock": follower.lock,
                "run": run.status,
                "spec": story.spec,
                "over": run.state in OVER,
                "fault": follower.fault,
                "phase": story.phase,
                "left": story.time_left(),
                "sites": [(name, site, seen.get(name)) for name, site in sorted(story.sites.items())],
                "plots": [plot for plot in drawn if plot.curves],
                "figures": _figures(run, follower),
                "rounds": rounds[:ROUNDS],
                "earlier": max(0, len(rounds) - ROUNDS),
                "down": sum(sum(one.down.values()) for _, one in rounds),
                "up": sum(one.up for _, one in rounds),
                "versions": versions[::-1],
                "graph": plots.lineage(versions),
                "forgetting": forgetting,
                "audit": list(story.audit)[::-1],
                "log": list(story.log)[::-1],
            } | self._now()

    def lineage(self, *, whole: bool = True) -> dict[str, Any]:
        """The newest version of each of the newest runs."""
        versions = self._versions() if whole else self._versions.last
        shown = {"versions": versions[::-1], "graph": plots.lineage(versions)} if versions is not None else {}
        return {"lock": nullcontext()} | shown | self._now()

    def draft(self, *, like: str = "", start: str = "") -> str:
        """Return a run file to begin with: that of another run, going on from a version, or the least there is."""
        if not like:
            return f'start = "{start}"\n{STARTER}' if start else STARTER
        spec = to_plain(self.session.run(like).spec) | ({"start": start} if start else {})
        return tomli_w.dumps(_without_none(spec))

    def submit(self, text: str, token: str) -> Run:
        """Submit a run file; raises InputError and what the coordinator raises."""
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"the run file is not valid TOML: {error}") from None
        return self.session.submit(parse(RunSpec, document, where="run"), token=token)

    def roll_back(self, version: str, reason: str) -> None:
        """Take back what came after a version; raises what the coordinator raises."""
        self.session.roll_back(version, reason=reason)
        for follower in list(self._followers.values()):
            follower.turn()

    def _now(self) -> dict[str, Any]:
        return {"now": time.time(), "reader": self.reader}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list | tuple) else value


def _figures(run: Run, follower: Follower) -> dict[str, Any]:
    """The figures by held-out set and over all, those of the report once there is one, and what it says of them."""
    report = run.report
    if not report:
        scores = {name: sets for name, sets in follower.story.scores.items() if name in FIGURES}
        names = sorted({name for sets in scores.values() for name in sets})
        rows = {name: {f: perplexity([sets[name]]) for f, sets in scores.items() if name in sets} for name in names}
        overall = {figure: perplexity(sets.values()) for figure, sets in scores.items()}
        return {"rows": rows, "overall": overall, "marks": {}}
    try:
        return {
            "rows": report["sites"],
            "overall": report["overall"],
            "marks": report.get("marks", {}),
            "attacks": report["attacks"],
            "protection": report["protection"],
            "warnings": report["warnings"],
            "moved": moved(report),
        }
    except (KeyError, TypeError):
        raise MismatchError(f"the report of run {run.id} is not as this version has it") from None
