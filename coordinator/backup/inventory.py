"""What a backup holds, in a file that the owner's key has signed: the journal by its digest, and by that the rest."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.store.blobs import Stored, move
from offsite.protos.documents import canonical, document, parse, plain, to_plain
from offsite.protos.errors import InputError, MismatchError, NotFoundError
from offsite.protos.ranges import Amount, Count, Digest, Line, Moment, Positive, Word
from offsite.protos.security.signing import sign, verify

FORMAT = 1
FILE, DRAFT = "backup.json", "backup.json.new"
LOST = 1000  # files that a home can have lost before what is left of it is no backup


@document
class Inventory:
    """What a backup holds."""

    format: Positive = FORMAT
    version: Line  # of offsite
    taken_at: Moment
    journal: Stored
    rows: dict[Word, Amount]  # of the journal, by table
    live: Count  # runs that are not over
    files: Amount  # that the journal names, and their bytes
    bytes: Amount
    lost: Annotated[tuple[Digest, ...], Field(max_length=LOST)]  # such files that the home itself had no more
    crl_number: Amount  # of the newest revocation list that was read
    policy: OwnerPolicy

    def __str__(self) -> str:
        """Say it in a line."""
        rows = f"{self.rows['runs']} runs ({self.live} not over), {self.rows['events']} events"
        return f"{rows}, {self.files} files, {self.bytes / 1e6:.1f} MB, as of {self.moment}"

    @property
    def moment(self) -> str:
        """When it was taken, for people."""
        return f"{datetime.fromtimestamp(self.taken_at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def write(folder: Path, inventory: Inventory, owner_key: Path) -> None:
    """Sign an inventory and write it, durable, in the place of an earlier one."""
    value = to_plain(inventory)
    signature = sign(canonical(value), owner_key, purpose="backup").hex()
    draft = folder / DRAFT
    draft.write_text(json.dumps({"inventory": value, "signature": signature}, indent=1))
    move(draft, folder / FILE)


def read(folder: Path, identity: Path) -> Inventory:
    """Read a backup's inventory, signed with the owner key of a kit.

    Raises NotFoundError where there is no backup, InputError for one of a newer format, and MismatchError.
    """
    file = folder / FILE
    if not file.is_file():
        raise NotFoundError(f"{folder}: no backup: {FILE} is written last; if one was cut short, take it again")
    try:
        sealed = json.loads(file.read_bytes())
        value, signature = sealed["inventory"], bytes.fromhex(sealed["signature"])
        form, version = int(value["format"]), plain(str(value["version"]), most=20)
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{file}: not an inventory of a backup; take another copy of it") from None
    if form > FORMAT:
        raise InputError(f"{file}: format {form} is newer than {FORMAT}, which this is; install offsite {version}")
    try:
        verify(canonical(value), signature, identity / "owner.pub", purpose="backup")
    except MismatchError:
        raise MismatchError(
            f"{file}: changed, or not signed with the owner key of {identity}; a backup is restored with the key that "
            "it was taken with"
        ) from None
    return parse(Inventory, value, where=str(file))
