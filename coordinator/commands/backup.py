"""`offsite coordinator backup` and `restore`: a folder with all that another machine needs to go on."""

import json
from pathlib import Path
from typing import Annotated

import typer

from offsite.coordinator.commands.options import Format

Folder = Annotated[Path, typer.Argument(help="The backup's folder.")]
Identity = Annotated[Path, typer.Option(help="The coordinator's kit; its owner key signs backups, and is in none.")]


def backup(
    folder: Folder,
    identity: Identity,
    home: Annotated[Path, typer.Option(help="The coordinator's folder.")] = Path("offsite-home"),
    format: Format = "text",
) -> None:
    """Copy the journal and the files that it names into a folder; a coordinator may be up.

    Into the folder of an earlier backup, which holds until then, only what is new is copied.
    """
    from offsite.coordinator.backup.taking import take
    from offsite.coordinator.home import Home
    from offsite.protos.documents import to_plain
    from offsite.protos.errors import MismatchError, NotFoundError

    if not (at := Home(home.resolve(), identity.resolve())).begun:
        raise NotFoundError(f"{at.root}: not a coordinator's folder: it has no journal; name one with --home")
    inventory, new = take(at.prepare(), folder.resolve())
    if format == "json":
        print(json.dumps({**to_plain(inventory), "new": vars(new)}), flush=True)
    else:
        print(f"{folder}: {inventory}; new are {new.files} files, {new.bytes / 1e6:.1f} MB", flush=True)
    if inventory.lost:
        raise MismatchError(
            f"{folder}: the backup is whole, but the coordinator has lost {len(inventory.lost)} files itself, "
            f"{inventory.lost[0]} among them; look at its disk or bucket, or for them in an earlier backup"
        )


def restore(
    folder: Folder,
    identity: Identity,
    home: Annotated[Path, typer.Option(help="The new coordinator's folder; none, or empty.")] = Path("offsite-home"),
    journal: Annotated[
        str,
        typer.Option(envvar="OFFSITE_JOURNAL", show_envvar=True, help="URL of an empty journal; else SQLite in HOME."),
    ] = "",
    blobs: Annotated[
        str, typer.Option(envvar="OFFSITE_BLOBS", show_envvar=True, help="URL of the blobs; else a folder in HOME.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the whole backup, and restore nothing.")] = False,
    format: Format = "text",
) -> None:
    """Make a coordinator's folder of a backup, with stores of any kind; runs go on once it is up.

    The kit must have the owner key that the backup was taken with. What is killed in the middle can be done again.
    """
    from offsite.coordinator.backup.restoring import Backup
    from offsite.coordinator.home import Home
    from offsite.protos.documents import to_plain

    at = Home(home.resolve(), identity.resolve())
    source = Backup(folder.resolve(), at.identity)
    if dry_run:
        source.check()
    else:
        source.restore(at, journal=journal, blobs=blobs)
    inventory = source.inventory
    if format == "json":
        print(json.dumps({"dry_run": dry_run, **to_plain(inventory)}))
    elif dry_run:
        print(f"{folder} is whole: {inventory}")
    else:
        up = f"offsite coordinator up --home {home} --identity {identity}"
        print(f"{home}: {inventory}\n`{up} --policy ...` goes on")
