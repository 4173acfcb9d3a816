"""The model owner's signatures (Ed25519) on what a site is asked to do and to download, and on backups.

What is signed is `offsite/v1 NUL purpose NUL document`: a signature made for one purpose is worth nothing for another.
"""

from pathlib import Path
from typing import Literal, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from offsite.protos.errors import IdentityError, MismatchError

Purpose = Literal["task", "bundle", "backup", "withdrawal"]


def sign(document: bytes, key_path: Path, *, purpose: Purpose) -> bytes:
    """Sign a document with the owner's key (64 bytes); raises IdentityError where the key cannot be used."""
    try:
        key = load_pem_private_key(key_path.read_bytes(), password=None)
    except OSError as error:
        raise IdentityError(
            f"{key_path}: cannot be read: {error.strerror}; signing needs the model owner's key"
        ) from None
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{key_path}: not an Ed25519 private key in PEM form; restore the model owner's key")
    return key.sign(_message(document, purpose))


def verify(document: bytes, signature: bytes, public_path: Path, *, purpose: Purpose) -> None:
    """Check a signature; raises MismatchError where it is not the owner's, IdentityError for an unusable key."""
    try:
        key = load_pem_public_key(public_path.read_bytes())
    except OSError as error:
        raise IdentityError(f"{public_path}: cannot be read: {error.strerror}; it is part of every kit") from None
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError(f"{public_path}: not an Ed25519 public key in PEM form; copy it again from the model owner")
    try:
        key.verify(signature, _message(document, purpose))
    except InvalidSignature:
        raise MismatchError(
            f"the signature of this {purpose} is not the model owner's ({public_path}): it was changed on its way "
            "or signed with another key, and is not used; ask the model owner"
        ) from None


def _message(document: bytes, purpose: Purpose) -> bytes:
    if purpose not in get_args(Purpose):
        raise ValueError(f"purpose must be one of {', '.join(get_args(Purpose))}, got {purpose!r}")
    return b"offsite/v1\0" + purpose.encode() + b"\0" + document
