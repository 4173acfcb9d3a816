"""The token that lets a process into a Ray cluster: one for all its machines, in a file that only its owner can read.

Ray reads it when it is first used, from the environment.
"""

import os
import secrets
from pathlib import Path

from offsite.protos.errors import InputError

BYTES = 4096


def admitted(file: Path | None) -> dict[str, str]:
    """Return this process's environment with what lets one of its children in: a file's token, or what it has itself.

    Raises InputError for a file that holds none.
    """
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    if file is not None:
        if not file.is_file() or not 0 < file.stat().st_size <= BYTES:
            raise InputError(f"{file}: no file with a cluster's token; copy the one that the head's machine has")
        environment["RAY_AUTH_TOKEN_PATH"] = str(file.resolve())
        environment.pop("RAY_AUTH_TOKEN", None)
    if environment.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        environment["RAY_AUTH_MODE"] = "token"
    return environment


def made(file: Path) -> Path:
    """Return a file with a token that only this user can read; made if missing."""
    if not file.exists():
        partial = file.with_name(f"{file.name}.partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as handle:
            handle.write(secrets.token_hex(32))
        partial.replace(file)
    file.chmod(0o600)
    return file
