"""A kit's files on disk: written whole or not at all, and its key and certificate replaced as one.

A new key waits as `next.key` while its certificate is asked for. Then the certificate is written as `next.crt`, the key
takes its place, and the certificate takes its own. Whoever looks meanwhile, or after a kill, takes the key in `tls.key`
with the certificate that belongs to it.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from offsite.protos.errors import IdentityError, InputError

KEY, CERTIFICATE = "tls.key", "tls.crt"
NEXT_KEY, NEXT_CERTIFICATE = "next.key", "next.crt"


def write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file whole or not at all; a secret one is never readable by others, not even for a moment.

    Raises InputError where it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what is another one once a file was written anew; None where there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


def private(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, *, form: Encoding = Encoding.PEM) -> bytes:
    """Write a private key."""
    return key.private_bytes(form, PrivateFormat.PKCS8, NoEncryption())


@contextmanager
def pair(kit: Path) -> Iterator[tuple[Path, Path]]:
    """Give the files of a kit's certificate and of the key to it, which belong together until the body ends."""
    with _locked(kit, fcntl.LOCK_SH):
        yield kit / (NEXT_CERTIFICATE if _is_between(kit) else CERTIFICATE), kit / KEY


def next_key(kit: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key that a certificate is asked for, the same until it has one; made if missing.

    Raises InputError where the kit cannot be written, IdentityError where the file holds no such key.
    """
    with _locked(kit, fcntl.LOCK_EX):
        _settle(kit)
        path = kit / NEXT_KEY
        if not path.exists():
            write(path, private(ec.generate_private_key(ec.SECP256R1())), secret=True)
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError(f"{path}: not a private key of ours; remove the file, and a new one is made")
        return key


def replace_pair(kit: Path, certificate: bytes) -> None:
    """Put `next.key` and a certificate (PEM) for it in the place of the key and certificate that the kit has."""
    with _locked(kit, fcntl.LOCK_EX):
        write(kit / NEXT_CERTIFICATE, certificate)
        (kit / NEXT_KEY).replace(kit / KEY)
        _settle(kit)


def _is_between(kit: Path) -> bool:
    """Tell whether a new key is in its place and its certificate is not."""
    return (kit / NEXT_CERTIFICATE).exists() and not (kit / NEXT_KEY).exists()


def _settle(kit: Path) -> None:
    if _is_between(kit):
        (kit / NEXT_CERTIFICATE).replace(kit / CERTIFICATE)


@contextmanager
def _locked(kit: Path, how: int) -> Iterator[None]:
    """Hold a folder, among others that look into it or change it; a file system without locks goes without."""
    try:
        folder = os.open(kit, os.O_RDONLY)
    except OSError:  # what is missing is said of the files in it
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(folder, how)
        yield
    finally:
        os.close(folder)
