"""Reading a backup: to check it, or to make a coordinator's home of it, on whichever machine and with any stores."""

import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from offsite.coordinator.backup.contents import FILES, named
from offsite.coordinator.backup.inventory import Inventory, read
from offsite.coordinator.home import Home
from offsite.coordinator.store.blobs import Folder, room
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal, url_of
from offsite.protos.chunks import digest_file
from offsite.protos.errors import ConflictError, InputError, MismatchError, NotFoundError, ResourceError
from offsite.protos.events import Warned


class Backup:
    """A backup that was taken with the owner key of a kit."""

    def __init__(self, folder: Path, identity: Path) -> None:
        """Read what it holds; raises NotFoundError, InputError or MismatchError where there is no such backup."""
        self.inventory: Inventory = read(folder, identity)
        self._folder, self._files = folder, Folder(folder / FILES)

    def check(self) -> None:
        """Read all of it; raises MismatchError where it is damaged, InputError where a newer version took it."""
        with TemporaryDirectory() as scratch, self._journal(Path(scratch)) as journal:
            for digest in self._named(journal):
                self._whole(digest)

    def restore(self, home: Home, *, journal: str = "", blobs: str = "") -> None:
        """Make a home of it, with its stores by URL or in the home, and the journal last: killed, it is done again.

        Raises ConflictError for a home or a journal that has begun, else as `check`.
        """
        home.prepare()
        with closing(home.journal(journal)) as target, closing(target.hold()) as hold:
            if not hold.take() or target.gateways():
                raise ResourceError(f"{home.root}: a coordinator is up on its journal; name another, or stop it first")
            if not target.empty:
                raise ConflictError(
                    f"{home.root}: its journal is in use already; restore into a new --home, and with --journal into "
                    "an empty database or schema"
                )
            home.use(journal=journal, blobs=blobs)
            with TemporaryDirectory(dir=home.node.scratch) as scratch, self._journal(Path(scratch)) as source:
                stored, draft = home.blobs(), Path(scratch) / "blob"
                for digest in self._named(source):
                    if digest not in stored:
                        file = self._whole(digest)
                        room(home.node.scratch, file.stat().st_size)
                        shutil.copyfile(file, draft)  # no link: nothing of the backup is used
                        stored.keep(draft, digest, soon=False)
                home.keep(self.inventory.policy)
                home.crl_seen.write_text(str(self.inventory.crl_number))
                news = f"restored from a backup of {self.inventory.moment}; what came later is done again"
                source.wake(Warned(message=news), away_s=max(0.0, time.time() - self.inventory.taken_at))
                target.fill(source)

    @contextmanager
    def _journal(self, scratch: Path) -> Iterator[Journal]:
        """Open a copy of its journal."""
        file = scratch / "journal.db"
        shutil.copyfile(self._whole(self.inventory.journal.digest), file)
        with closing(open_journal(url_of("sqlite", file))) as journal:
            if unknown := journal.unknown:
                raise InputError(
                    f"{self._folder}: its journal has {unknown[0]}, which this version does not know; install offsite "
                    f"{self.inventory.version} to restore it"
                )
            yield journal

    def _named(self, journal: Journal) -> list[str]:
        """Return the blobs that it holds; raises MismatchError where it does not hold as many as it says."""
        needed, useful = named(journal, self._files)
        digests = (needed - {*self.inventory.lost}) | {digest for digest in useful if digest in self._files}
        if len(digests) != self.inventory.files:
            raise MismatchError(
                f"{self._folder}: the backup is damaged: it has {len(digests)} files of {self.inventory.files}; take "
                "another copy of it"
            )
        return sorted(digests)

    def _whole(self, digest: str) -> Path:
        """Return the place of a file, its bytes checked."""
        with suppress(NotFoundError):
            path, _ = self._files.passed(digest)
            if digest_file(path, like=digest) == digest:
                return path
        raise MismatchError(
            f"{self._folder}: the backup is damaged: file {digest} is missing or has changed; take another copy of it"
        )
