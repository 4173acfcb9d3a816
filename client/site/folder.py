"""A site's work folder: what it downloads, what it trains and its own log. It belongs to one site and one process.

    owner.json      whose it is
    lock            held by the process that works in it
    secret          what the noise on its updates comes from
    site.log        what the site says of itself, with details that never leave it
    trainers.log    what the process that trainers are forked from says
    bundles/        emulators, kept for later rounds and runs
    adapters/       what the open tasks, or the last one, start from
    anchors/        what they are held to, so as not to forget earlier tasks
    tasks/RUN/      what the open tasks give
    reservoirs/     rows that are kept of a run, for later ones to rehearse
    approvals/      what a person here is asked to allow, and what was decided
    micro-batches/  of a run: how many rows at once this machine's memory has room for
    residuals/RUN/  what stages left out of an update, by its digest, for the run's next round

Nobody but the site's own user can read it.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Self

from offsite.client.site import reservoir
from offsite.client.site.policy import MIB, Policy
from offsite.protos.chunks import digest_bytes, hex_of
from offsite.protos.errors import ConflictError, ResourceError, from_system
from offsite.protos.security.draws import SECRET_BYTES
from offsite.protos.security.identity import Identity
from offsite.protos.spec import TaskSpec

LOG_BYTES = 8 * MIB  # of one of the two files of the log
DAY_S = 86_400.0


class WorkFolder:
    """A folder that this process alone works in."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._log = _log(path / "site.log")

    @classmethod
    def open(cls, path: Path, kit: Identity) -> Self:
        """Take a folder for a site; raises ConflictError where it is another's, ResourceError while it is in use."""
        owner = {"site": kit.name, "authority": digest_bytes(kit.authority)}
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            document = path / "owner.json"
            if not document.exists() and any(entry.name != "lock" for entry in path.iterdir()):
                raise ConflictError(f"{path}: not empty, and not a site's work folder; name another with --work")
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            _hold(lock, path)
            path.chmod(0o700)
            if document.exists() and (other := json.loads(document.read_bytes())) != owner:
                os.close(lock)
                whose = f"site {other['site']}" + (" of another authority" if other["site"] == kit.name else "")
                raise ConflictError(f"{path}: the work folder of {whose}; name another for {kit.name} with --work")
            partial = path / "owner.partial"
            partial.write_text(json.dumps(owner))
            partial.replace(document)
            secret = path / "secret"
            _draw(secret)
            if secret.stat().st_size != SECRET_BYTES:
                os.close(lock)
                raise ConflictError(
                    f"{secret}: not the {SECRET_BYTES} bytes of a site's secret; restore it, or remove it once no task "
                    "is open"
                )
        except OSError as error:
            raise from_system(error) from None
        except (ValueError, KeyError, TypeError):
            raise ConflictError(f"{path / 'owner.json'}: not readable; name another folder with --work") from None
        return cls(path, lock)

    def close(self) -> None:
        """Let another process work in the folder."""
        os.close(self._lock)
        for handler in self._log.handlers:
            handler.close()
        self._log.handlers.clear()

    def write(self, kind: str, data: dict[str, Any]) -> None:
        """Add a line to the site's own log; a full disk does not disturb the work."""
        self._log.info(json.dumps({"event": kind, "at": time.time(), **data}, ensure_ascii=False, default=str))

    # where things are

    @property
    def secret(self) -> Path:
        """Return the file of the site's secret, which never leaves it."""
        return self.path / "secret"

    def bundle(self, task: TaskSpec) -> Path:
        """Return the folder of a task's emulator; its manifest is beside it, with the ending .json."""
        return self.path / "bundles" / hex_of(task.manifest, most=16)

    def adapter(self, task: TaskSpec) -> Path:
        """Return the file of what a task starts from."""
        return self.path / "adapters" / f"{hex_of(task.adapter, most=16)}.safetensors"

    def anchor(self, task: TaskSpec) -> Path | None:
        """Return the file of what a task's retention holds training to; None if it needs none."""
        return self.path / "anchors" / f"{hex_of(task.anchor, most=16)}.safetensors" if task.anchor else None

    def task(self, task: TaskSpec) -> Path:
        """Return the folder of what a task gives."""
        return self.path / "tasks" / task.run / f"round-{task.round}-{task.attempt}"

    def residual(self, task: TaskSpec, update: str) -> Path:
        """Return the file of what stages left out of an update of the task's run."""
        return self.path / "residuals" / task.run / f"{hex_of(update, most=32)}.safetensors"

    def earlier(self, path: Path) -> Path | None:
        """Return the newest file that may hold much of what an adapter, or a file of an emulator, will hold."""
        kind = self.path / path.relative_to(self.path).parts[0]
        within = path.relative_to(kind).parts[1:]  # of an emulator: where in its folder
        others = (one.joinpath(*within) for one in kind.glob("*") if one.is_dir() or not within)
        files = [one for one in others if one != path and one.is_file() and one.suffix == path.suffix]
        return max(files, key=lambda one: one.stat().st_mtime, default=None)

    def keep_residual(self, task: TaskSpec, update: str) -> None:
        """Keep what stages left out of a task's update, should the coordinator take it; what was there before stays."""
        source, target = self.task(task) / "residual.safetensors", self.residual(task, update)
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)

    def reservoirs(self, task: TaskSpec) -> list[Path]:
        """Return the files of rows that were kept of the runs that a task's run goes on from."""
        files = reservoir.chain(self.path / "reservoirs", task.continues.run) if task.continues else []
        for file in files:
            os.utime(file)  # the time of its last use
        return [file.resolve() for file in files]

    def keep_rows(self, task: TaskSpec) -> None:
        """Keep rows of a task, where it says so; the last round's stand for the run."""
        source = self.task(task) / "reservoir.jsonl"
        if source.exists():
            target = self.path / "reservoirs" / f"{task.run}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)

    def micro_batch(self, task: TaskSpec) -> int:
        """Return how many rows at once memory had room for in a task's run; 0 if it never ran out."""
        file = self.path / "micro-batches" / task.run
        return int(file.read_text()) if file.exists() else 0

    def keep_micro_batch(self, task: TaskSpec, rows: int) -> None:
        """Keep that for the run's later rounds."""
        file = self.path / "micro-batches" / task.run
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(str(rows))
        partial.replace(file)

    # what goes

    def clear(self, task: TaskSpec) -> None:
        """Remove what a task that is over left here; the emulator stays for later rounds, and one adapter."""
        shutil.rmtree(self.task(task), ignore_errors=True)
        self._clear_adapters()

    def clear_tasks(self) -> None:
        """Remove what all tasks left here, when none is open."""
        shutil.rmtree(self.path / "tasks", ignore_errors=True)
        self._clear_adapters()

    def _clear_adapters(self) -> None:
        """Remove all but the newest, of which the next one may hold much, and the newest of what they are held to."""
        for kind in ("adapters", "anchors"):
            files = sorted((self.path / kind).glob("*"), key=lambda one: one.stat().st_mtime)
            for file in files[:-1]:
                file.unlink()

    def clear_residuals(self, task: TaskSpec) -> None:
        """Remove what belongs to no update that the coordinator has last from this site in the task's run."""
        kept = self.residual(task, task.previous) if task.previous else None
        for file in (self.path / "residuals" / task.run).glob("*"):
            if file != kept:
                file.unlink()

    def clear_bundles(self, policy: Policy, *, used: Path | None = None) -> None:
        """Remove emulators that were not used for long, and the oldest of more than the policy keeps; not the one used.

        What is kept of a run beside them goes, too, where that run has asked for none for long. The time of a last
        use is that of the folder.
        """
        if used is not None and used.is_dir():
            os.utime(used)
        entries = sorted((self.path / "bundles").glob("*"), key=lambda one: one.stat().st_mtime, reverse=True)
        room = policy.keep_bundles_mib * MIB
        for entry in entries:
            old = _is_old(entry, policy)
            if entry.is_dir():
                room -= sum(file.lstat().st_size for file in entry.rglob("*"))
                if entry != used and (old or room < 0):
                    shutil.rmtree(entry, ignore_errors=True)
            elif old and entry.name.endswith(".partial"):  # a download that was broken off
                entry.unlink()
        for document in (self.path / "bundles").glob("*.json"):
            if not document.with_suffix("").is_dir():
                document.unlink()
        self._clear_runs(policy)

    def _clear_runs(self, policy: Policy) -> None:
        """Remove what is kept of runs that asked for nothing for long, and all rows where the policy allows none."""
        for run in (self.path / "residuals").glob("*"):
            if _is_old(run, policy):
                shutil.rmtree(run, ignore_errors=True)
        for file in (self.path / "micro-batches").glob("*"):
            if _is_old(file, policy):
                file.unlink()
        for file in (self.path / "reservoirs").glob("*"):
            if _is_old(file, policy) or not policy.replay_rows:
                file.unlink()


def _is_old(path: Path, policy: Policy) -> bool:
    return time.time() - path.stat().st_mtime > policy.keep_days * DAY_S


def _draw(secret: Path) -> None:
    """Draw a site's secret, unless it has one: with another, a task that is repeated would get other noise."""
    if secret.exists():
        return
    partial = secret.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.urandom(SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(secret)


def _hold(lock: int, path: Path) -> None:
    """Lock a file that says who holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
        os.close(lock)
        raise ResourceError(
            f"{path}: a site that runs already, as process {holder or 'unknown'}, works in this folder; stop it, or "
            "name another folder with --work"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def _log(path: Path) -> logging.Logger:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    path.chmod(0o600)
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", errors="replace")
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk, of which the task will say
    log = logging.Logger(f"offsite.site {path}", logging.INFO)
    log.addHandler(handler)
    return log
