"""The exam of the version that a run ends with: sites that measured the others are asked for it and nothing else."""

import time
from dataclasses import replace

from offsite.coordinator.home import Home
from offsite.coordinator.runs.exams import sheets
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.partial import at_site
from offsite.coordinator.runs.rounds import TIME_EVERY_S, task_of
from offsite.coordinator.store.journal import OPEN, Journal, Key
from offsite.protos.documents import to_json
from offsite.protos.security.signing import sign
from offsite.protos.spec import EXAMS

ABSENT_S = 60.0  # a site that was not heard for so long is not waited for


class Examination:
    """The exam of a run's last version, by its number; all that is known of it is in the journal."""

    def __init__(self, home: Home, journal: Journal, run: str, spec: Grant, history: History, version: int) -> None:
        self._home, self._journal, self._run, self._spec = home, journal, run, spec
        self._history, self._version = history, version
        self._timed = 0.0  # when it was last looked who is out of time

    def open(self) -> None:
        """Ask the sites that told of the last round; what they were asked before stands."""
        last = self._version - 1
        told = sheets(self._journal.tasks(self._run, last)).get(last, {})
        offers = []
        for site in sorted(told.keys() - self._journal.outs(self._run).keys()):
            document = self._task(site)
            signature = sign(document, self._home.owner_key, purpose="task")
            offers.append((Key(self._run, EXAMS + self._version, site, 0), document, signature))
        self._journal.add_tasks(offers)

    def _task(self, site: str) -> bytes:
        """Return a task of the round before, but for what it is of and what it begins with."""
        tier = self._history.tiers(self._version - 1)[site]
        start = self._history.version(self._version).broadcast[tier]
        before = task_of(Key(self._run, self._version - 1, site, 0), self._spec, self._history, tier=tier, size=0)
        number = EXAMS + self._version
        return to_json(at_site(replace(before, round=number, adapter=start.digest, adapter_size=start.size), site))

    def over(self, *, since: float) -> bool:
        """Tell whether no site is at it any more; one that is away, or got stuck, is left out.

        Before `since`, nobody was there to whom sites could have said that they are here, or that they get further.
        """
        tasks = [task for task in self._journal.tasks(self._run, EXAMS + self._version) if task.state in OPEN]
        now = time.time()
        if not tasks or now - self._timed < TIME_EVERY_S:
            return not tasks
        self._timed = now
        here = self._journal.present(now - ABSENT_S)
        for task in tasks:
            quiet = now - max(since, task.moved_at)
            away = task.state == "offered" and task.site not in here
            if quiet > (ABSENT_S if away else self._spec.stall_s):
                key = Key(self._run, task.round, task.site, task.attempt)
                self._journal.set_task(key, state="stalled", message=f"told nothing for {quiet:.0f} s")
        return False
