"""The coordinator's folder on disk: journal, blobs, half-done uploads, scratch space, and its identity."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.store.blobs import Blobs
from offsite.coordinator.store.journal import Journal
from offsite.protos.documents import from_json, to_json

STALE_S = 24 * 3600.0


@dataclass(frozen=True)
class Home:
    """Paths under one root; `identity` is the kit with the owner's signing key."""

    root: Path
    identity: Path

    def prepare(self) -> "Home":
        """Make the folders, for this account alone; idempotent."""
        for folder in (self.root, self.spool, self.scratch):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        return self

    def sweep(self) -> None:
        """Remove what kills left behind: scratch files and half uploads that nobody has touched for a day."""
        for folder in (self.scratch, self.spool):
            for path in folder.iterdir():
                touched = max(file.stat().st_mtime for file in (path, *path.rglob("*")))
                if time.time() - touched > STALE_S:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def spool(self) -> Path:
        """Uploads that are not complete."""
        return self.root / "spool"

    @property
    def scratch(self) -> Path:
        """Files under construction."""
        return self.root / "scratch"

    @property
    def owner_key(self) -> Path:
        """The model owner's signing key."""
        return self.identity / "owner.key"

    def keep(self, policy: OwnerPolicy) -> None:
        """Have the runs of this home held against a policy, wherever their steps are done."""
        made = self.root / "policy.json.new"
        made.write_bytes(to_json(policy))
        made.replace(self._policy)

    def policy(self) -> OwnerPolicy:
        """Return the policy that was kept; the default if there was none."""
        if not self._policy.exists():
            return OwnerPolicy()
        return from_json(OwnerPolicy, self._policy.read_bytes(), where=str(self._policy))

    @property
    def _policy(self) -> Path:
        return self.root / "policy.json"

    def journal(self) -> Journal:
        """Open the journal."""
        return Journal(self.root / "journal.db")

    def blobs(self) -> Blobs:
        """Open the blobs."""
        return Blobs(self.root / "blobs")
