"""Taking a backup, also while a coordinator works on its runs."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from offsite.coordinator.backup.contents import FILES, named
from offsite.coordinator.backup.inventory import DRAFT, FILE, LOST, Inventory, write
from offsite.coordinator.home import Home
from offsite.coordinator.store.blobs import Blobs, Folder, Stored
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal, url_of
from offsite.protos.errors import ConflictError, MismatchError, NotFoundError, ResourceError

LOCK = "lock"

log = logging.getLogger(__name__)


@dataclass
class New:
    """What an earlier backup in the folder did not have."""

    files: int = 0
    bytes: int = 0


def take(home: Home, folder: Path) -> tuple[Inventory, New]:
    """Back up a home into a folder that is new, empty or has an earlier backup; raises OffsiteError."""
    with _alone(folder) as files, closing(home.journal()) as journal:
        number = int(home.crl_seen.read_text()) if home.crl_seen.exists() else 0
        new = New()
        copy = _copy(journal, home.blobs(), files, home.node.scratch, new)
        if copy.lost:  # or collected, of a run that has ended meanwhile: another look at the journal tells
            copy = _copy(journal, home.blobs(), files, home.node.scratch, new)
        if len(copy.lost) > LOST:
            raise NotFoundError(
                f"{home.root}: {len(copy.lost)} files that the journal names are not there; look where they are"
            )
        inventory = Inventory(
            version=version("offsite"),
            taken_at=copy.taken_at,
            journal=copy.journal,
            rows=copy.rows,
            live=copy.live,
            files=len(copy.held),
            bytes=sum(copy.held.values()),
            lost=tuple(sorted(copy.lost)),
            crl_number=number,
            policy=home.policy(),
        )
        write(folder, inventory, home.owner_key)
        files.sweep({*copy.held, copy.journal.digest}, before=float("inf"))
        return inventory, new


@contextmanager
def _alone(folder: Path) -> Iterator[Folder]:
    """Keep others from a backup's folder, and from one that has other files: what is not the backup's is removed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if others := sorted({path.name for path in folder.iterdir()} - {FILE, DRAFT, FILES, LOCK}):
        raise ConflictError(f"{folder}: not a backup: it has {others[0]}; name a new folder, or an empty one")
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield Folder(folder / FILES)
    except Timeout:
        raise ResourceError(f"{folder}: another backup is being taken into it; wait for that") from None


@dataclass
class _Copy:
    """A copy of a home as it was at a moment."""

    taken_at: float
    rows: dict[str, int]
    live: int
    journal: Stored = field(init=False)
    held: dict[str, int] = field(default_factory=dict)  # blobs, and their bytes
    lost: set[str] = field(default_factory=set)


def _copy(journal: Journal, blobs: Blobs, files: Folder, scratch: Path, new: New) -> _Copy:
    """Copy a journal and then the blobs that it names: they were stored before."""
    taken_at = time.time()
    with TemporaryDirectory(dir=scratch) as folder:
        file = Path(folder) / "journal.db"
        with closing(open_journal(url_of("sqlite", file))) as mirror:
            copy = _Copy(taken_at, mirror.fill(journal), len(mirror.live()))
            done: set[str] = set()
            while ahead := set().union(*(names := named(mirror, files))) - done:  # manifests name more
                done |= ahead
                for digest in sorted(ahead):
                    if digest in names[0] or digest in blobs:  # else it was collected, and goes from the backup as well
                        _add(copy, digest, blobs, files, new)
            copy.lost = names[0] - copy.held.keys()
        digest, size = files.take(file)
    copy.journal = Stored(digest=digest, size=size)
    return copy


def _add(copy: _Copy, digest: str, blobs: Blobs, files: Folder, new: New) -> None:
    """Copy a blob unless an earlier backup has it; one that is missing or has changed is not copied."""
    draft, is_new = files.root / "draft", digest not in files
    try:
        if is_new:
            draft.unlink(missing_ok=True)
            blobs.copy(digest, draft)
            files.take(draft, digest=digest)
        copy.held[digest] = size = files.size(digest)
        new.files, new.bytes = new.files + is_new, new.bytes + is_new * size
    except (NotFoundError, MismatchError, FileNotFoundError) as error:
        log.debug("%s is not in the backup: %s", digest, error)
