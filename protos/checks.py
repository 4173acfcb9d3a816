"""What a machine needs before it takes part, looked at one by one: what is so, what is doubtful, and what to do."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from offsite.protos.errors import IdentityError, OffsiteError, ResourceError, from_system

GB = 1e9
STALE_S = 600.0  # a compilation takes less


class Doubt(Exception):
    """What hinders nothing yet; says what to do."""


@dataclass(frozen=True)
class Check:
    """What one look came to. `code` is the exit code of what fails, 0 of what does not."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    message: str
    code: int = 0


def check(name: str, look: Callable[[], str]) -> Check:
    """Look at something: what it returns is so, a Doubt is a warning, and an error of ours is what fails."""
    try:
        return Check(name, "ok", look())
    except Doubt as doubt:
        return Check(name, "warn", str(doubt))
    except OffsiteError as error:
        return Check(name, "fail", str(error), error.exit_code)
    except OSError as error:
        known = from_system(error)
        return Check(name, "fail", str(known), known.exit_code)


def show(checks: Iterable[Check], *, form: Literal["text", "json"]) -> int:
    """Print each check as it is done, JSON once all are; return the highest exit code, 0 where nothing fails."""
    done = []
    for one in checks:
        done.append(one)
        if form == "text":
            print(f"{one.verdict:4}  {one.name:12}  {one.message}", flush=True)
    if form == "json":
        print(json.dumps([asdict(one) for one in done], indent=2))
    return max((one.code for one in done), default=0)


def versions(*needed: str, beside: tuple[str, ...] = ()) -> str:
    """Say which versions are installed; raises ResourceError for a package that is needed and is not there."""
    have, missing = [f"Python {sys.version.split()[0]}"], []
    for name in dict.fromkeys(("offsite", *needed, *beside)):
        try:
            have.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing += [name] * (name in needed)
    if missing:
        raise ResourceError(f"{', '.join(missing)}: not installed; pip install 'offsite[all]' has all of it")
    return ", ".join(have)


def kit(folder: Path, *roles: str) -> str:
    """Say whose kit it is and until when; raises IdentityError for one that does not hold, or not by this clock."""
    from offsite.protos.security.identity import Identity
    from offsite.protos.security.revocation import RevocationList

    own = Identity.load(folder)
    if roles and own.role not in roles:
        raise IdentityError(f"{folder}: the kit of {own.role} {own.name!r}; here one of {' or '.join(roles)} is needed")
    where = folder / "crl.pem"
    listed = RevocationList.parse(where.read_bytes(), own.authority, where=where)
    if listed.until < datetime.now(UTC):
        raise IdentityError(
            f"{where}: the list of certificates held until {listed.until:%Y-%m-%d}; renew it with `offsite pki "
            "refresh` and copy it from the authority's folder"
        )
    if own.warning:
        raise Doubt(own.warning)
    return f"{own.role} {own.name!r}, until {own.expires:%Y-%m-%d}, its list until {listed.until:%Y-%m-%d}"


def disk(folder: Path, *, least_gb: float) -> str:
    """Say how much is free where a folder is or will be; raises ResourceError if that is less than what is asked."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ResourceError(f"{there}: no folder that this account may write in; give it the right, or name another")
    free = shutil.disk_usage(there).free
    if free < least_gb * GB:
        raise ResourceError(f"{there}: {free / GB:.1f} GB are free, and {least_gb:g} GB are wanted; make room")
    return f"{there}: {free / GB:.1f} GB free"


def memory(*, least_gb: float) -> str:
    """Say how much memory there is; raises ResourceError if that is less than what is asked."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total < least_gb * GB:
        raise ResourceError(f"{total / GB:.1f} GB of memory, and {least_gb:g} GB are wanted; take a larger machine")
    return f"{total / GB:.1f} GB, {os.cpu_count()} cores"


def gpus() -> str:
    """Say which GPUs torch sees; a Doubt where it cannot use one that is there."""
    try:
        import torch
    except ImportError:
        raise ResourceError("torch is not installed; pip install 'offsite[all]'") from None
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    if Path("/proc/driver/nvidia").exists():
        raise Doubt(f"there is one, and torch {torch.__version__} cannot use it; install a torch for CUDA")
    return "none; all is computed on the CPU"


def compilations(folder: Path | None = None) -> str:
    """Look at where DeepSpeed's parts are compiled; a Doubt for a lock that a compilation left when it was killed.

    `folder` is torch's own unless it is given.
    """
    root = folder or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    stale = [lock for lock in sorted(root.rglob("lock")) if time.time() - lock.stat().st_mtime > STALE_S]
    if stale:
        raise Doubt(
            f"{stale[0]}: left by a compilation that was killed, and whoever compiles the same waits; remove it"
        )
    return f"{root}: no lock is left there"
