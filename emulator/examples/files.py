"""Which files of a folder hold examples, and why the others are left out."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from offsite.emulator.examples.fault import Fault

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")  # in capitals too, and with .gz behind
HIDDEN = "hidden files and folders"
OTHER = "files with another ending"
AGAIN = "links to what is read already"
OUTSIDE = "links that lead out of the folders allowed"
UNREADABLE = "files and folders that cannot be read"
HARMLESS = (HIDDEN, OTHER, AGAIN)  # not meant as data


def ending(path: Path) -> str:
    """Return the ending that says a file's format, in small letters: of `a.JSONL.gz` it is `.jsonl`."""
    last = path.suffix.lower()
    last = Path(path.stem).suffix.lower() if last == ".gz" else last
    return "" if last == ".parquet" and path.suffix.lower() == ".gz" else last  # it is compressed within


def paths(top: Path, *, folders: Sequence[Path] = ()) -> Iterator[tuple[Path, Fault | None]]:
    """Yield a file, or the files in a folder and those below it in order of their names.

    With each comes why it is left out, or None. Links are followed, each target once, and not out of `folders` if any
    are given. Raises ValueError if there is nothing at the path.
    """
    if not top.exists():
        raise ValueError(f"{top}: no such file or folder of examples")
    allowed = [folder.resolve() for folder in folders]
    waiting, seen = [top], set[Path]()
    while waiting:
        path = waiting.pop()
        try:
            target = path.resolve()
            fault = _fault(path, target, allowed=allowed, named=path == top, seen=seen)
            if fault is None and target.is_dir():
                waiting += sorted(path.iterdir(), reverse=True)
        except (OSError, RuntimeError) as error:  # Python 3.11 raises RuntimeError for links in a circle
            fault = Fault(UNREADABLE, f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")
        else:
            seen.add(target)
            if fault is None and target.is_dir():
                continue
        yield path, fault


def _fault(path: Path, target: Path, *, allowed: list[Path], named: bool, seen: set[Path]) -> Fault | None:
    if not named and (path.name.startswith(".") or path.name == "__MACOSX"):
        return Fault(HIDDEN, f"{path}: is hidden, as the companion files of macOS are")
    if allowed and not any(target.is_relative_to(folder) for folder in allowed):
        return Fault(OUTSIDE, f"{path}: leads to {target}, out of the folders allowed")
    if target in seen:
        return Fault(AGAIN, f"{path}: is a link to what is read already")
    if target.is_dir():
        return None
    if not target.is_file():
        return Fault(UNREADABLE, f"{path}: is neither a file nor a folder, or a link to nothing")
    if ending(path) not in ENDINGS:
        return Fault(OTHER, f"{path}: examples are read from files ending in {', '.join(ENDINGS)}, also with .gz")
    return None
