"""The coordinator's folder on disk: half-done uploads, where its journal and blobs are, its policy and identity."""

from dataclasses import dataclass, replace
from pathlib import Path

from offsite.coordinator.node import Node, sweep
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal, place, shown, url_of
from offsite.protos.documents import document, from_json, to_json
from offsite.protos.errors import ConflictError
from offsite.protos.ranges import Place


@document
class Stores:
    """Where a home's journal and blobs are, by URL; empty: in the home."""

    journal: Place = ""
    blobs: Place = ""


@dataclass(frozen=True)
class Home:
    """Paths under one root; `identity` is the kit with the owner's signing key."""

    root: Path
    identity: Path

    def prepare(self) -> "Home":
        """Make the folders, for this account alone; idempotent."""
        self.node.prepare()
        self.spool.mkdir(mode=0o700, exist_ok=True)
        self.spool.chmod(0o700)
        return self

    def sweep(self) -> None:
        """Remove what kills left behind: scratch files and half uploads that nobody has touched for a day."""
        self.node.sweep()
        sweep(self.spool)

    @property
    def spool(self) -> Path:
        """Uploads that are not complete."""
        return self.root / "spool"

    @property
    def node(self) -> Node:
        """What of it the steps see that are done on this machine."""
        return Node(self.root, self._blobs)

    @property
    def owner_key(self) -> Path:
        """The model owner's signing key."""
        return self.identity / "owner.key"

    @property
    def crl_seen(self) -> Path:
        """Where the highest number is kept of the revocation lists that were read."""
        return self.root / "crl-number"

    def keep(self, policy: OwnerPolicy) -> None:
        """Have the runs of this home held against a policy, whichever process looks after them."""
        _write(self._policy, policy)

    def policy(self) -> OwnerPolicy:
        """Return the policy that was kept; the default if there was none."""
        if not self._policy.exists():
            return OwnerPolicy()
        return from_json(OwnerPolicy, self._policy.read_bytes(), where=str(self._policy))

    @property
    def _policy(self) -> Path:
        return self.root / "policy.json"

    @property
    def begun(self) -> bool:
        """Whether it has a journal."""
        return self._stores.exists() or (self.root / "journal.db").exists()

    def use(self, *, journal: str = "", blobs: str = "") -> None:
        """Have every process that opens this home use these stores, by URL; empty: those that it uses already.

        Raises ConflictError for others than it began with, and OffsiteError for one that cannot be opened.
        """
        for url, now, what in ((journal, self._journal, "journal"), (blobs, self._blobs, "blobs")):
            if url and self.begun and place(url) != place(now):
                raise ConflictError(
                    f"{self.root} began with its {what} at {shown(now)}, not at {shown(url)}, where its runs would "
                    f"seem gone; leave out --{what}, or name another --home; if that is the same store under a new "
                    f"address, write it into {self._stores} first"
                )
        kept = self._kept()
        replace(self.node, url=blobs or self._blobs).blobs().check()
        open_journal(journal or self._journal).close()  # last: a home with a journal has begun
        _write(self._stores, Stores(journal=journal or kept.journal, blobs=blobs or kept.blobs))

    def journal(self, url: str = "") -> Journal:
        """Open the journal, or the one of another URL that the home is about to use."""
        return open_journal(url or self._journal)

    def blobs(self) -> Blobs:
        """Open the blobs."""
        return self.node.blobs()

    @property
    def _journal(self) -> str:
        return self._kept().journal or url_of("sqlite", self.root / "journal.db")

    @property
    def _blobs(self) -> str:
        return self._kept().blobs or url_of("file", self.root / "blobs")

    def _kept(self) -> Stores:
        if not self._stores.exists():
            return Stores()
        return from_json(Stores, self._stores.read_bytes(), where=str(self._stores))

    @property
    def _stores(self) -> Path:
        return self.root / "stores.json"  # holds passwords


def _write(path: Path, value: object) -> None:
    """Write a document for this account alone, whole or not at all."""
    partial = path.with_name(f"{path.name}.new")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_bytes(to_json(value))
    partial.replace(path)
