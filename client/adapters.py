"""Published adapters, on the machine of whoever fetched them. A tensor library is loaded when they are read."""

from collections.abc import Sequence
from pathlib import Path

from offsite.protos.errors import ConflictError, InputError


def compose(out: str | Path, adapters: Sequence[str | Path], *, without: Sequence[str | Path] = ()) -> Path:
    """Write the sum of published adapters of one base, which `offsite.emulator.plug.load` puts beside that base.

    Each has to be of a method that trains single entries of maps, as `lt-sft`, `spiel` and `sara` do. The same adapters
    give the same bytes in any order.

    Args:
        out: a new folder.
        adapters: folders of adapters, such as `adapter/` of a run's files.
        without: folders of those that are taken off again.

    Returns the folder. Raises ConflictError if it has files, and InputError if the adapters have no sum.
    """
    folder, added, taken = Path(out).expanduser(), _folders(adapters), _folders(without)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConflictError(f"{folder}: not empty; an adapter is everything in its folder, so name a new one")
    from offsite.emulator import composition  # torch

    try:
        composition.compose(folder, added, without=taken)
    except ValueError as error:
        raise InputError(str(error)) from error
    return folder


def _folders(paths: Sequence[str | Path]) -> list[Path]:
    return [Path(path).expanduser() for path in paths]
