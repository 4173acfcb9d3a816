"""A run that is done again without a site: which updates of the old one are still good, and what it changed.

In the first round that a site took part in, the others began from what had nothing of it: their updates stand, and are
folded without its own. From the next round on all rests on it, so that the sites are asked again, with the same seeds.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Replay
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.steps.results import fold
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.journal import Journal
from offsite.protos.documents import canonical, from_json
from offsite.protos.security.signing import sign
from offsite.protos.spec import TaskSpec

CERTIFICATE = "withdrawal/certificate.json"
SIGNATURE = "withdrawal/certificate.sig"


def kept(journal: Journal, replays: Replay, task: TaskSpec) -> dict[str, Any] | None:
    """Return the update that a site gave for the same task in the run that is done again; None: it has to train."""
    for row in reversed(journal.tasks(replays.run, replays.round - 1)):
        if row.site == task.site and row.state == "uploaded" and row.spec and replays.keeps:
            old = from_json(TaskSpec, row.spec, where="task")
            names = ("run", "round", "rounds", "attempt", "continues")
            if replace(old, **{name: getattr(task, name) for name in names}) == task:
                columns = ("state", "update", "norm", "metrics", "step", "steps", "loss")
                return {name: getattr(row, name) for name in columns}
    return None


def certificate(home: Home, journal: Journal, run: str, replays: Replay) -> dict[str, Stored]:
    """Return, as files to publish, what a withdrawal changed, and the owner's signature of that.

    Each round from the first that the site took part in is in it, with the digest of what went into the base before
    and after; and what was taken back with it, of runs that had gone on from there.
    """
    old, new = History(journal, replays.run), History(journal, run)
    rounds, number = [], replays.round
    while (before := old.get(fold(number))) and (after := new.get(fold(number - replays.round + 1))):
        one = {"round": number, "before": before.version.adapter, "after": after.version.adapter}
        rounds.append(one | {"sites": list(after.sites)})
        number += 1
    gone = journal.withdrawn([replays.run, *journal.origins()])
    document = {
        "format": 1,
        "run": replays.run,
        "site": replays.site,
        "by": replays.by,
        "at": replays.at,
        "reason": replays.reason,
        "again": run,
        "rounds": rounds,
        "withdrawn": sorted(f"{its}:{at}" for (its, at), row in gone.items() if row.reason == replays.words),
    }
    content = canonical(document)
    files = {CERTIFICATE: content, SIGNATURE: sign(content, home.owner_key, purpose="withdrawal")}
    return {name: _stored(home, content) for name, content in files.items()}


def _stored(home: Home, content: bytes) -> Stored:
    with TemporaryDirectory(dir=home.node.scratch) as scratch:
        file = Path(scratch) / "file"
        file.write_bytes(content)
        digest, size = home.blobs().take(file)
    return Stored(digest=digest, size=size)
