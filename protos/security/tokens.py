"""Tokens: one line of text by which a site or a person joins.

A token holds whom to dial and whom to trust, and an identity to be let in with: a certificate of role `joining`, which
may ask for one certificate and do nothing else, and its key. Whoever holds a token may use it, so it is a secret.
"""

import base64
import binascii
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import Field

from offsite.protos.documents import document, from_json, to_json
from offsite.protos.errors import IdentityError, InputError
from offsite.protos.ranges import Place
from offsite.protos.security import kit
from offsite.protos.security.certificates import MEMBERS, UNREADABLE, Peer, Role

PREFIX = "offsite-join-1."
MOST = 16_384  # characters of a token; one of a usual address has some 3000

_Der = Annotated[str, Field(max_length=8192, pattern=r"^[A-Za-z0-9_-]+$")]  # in base64url


@document
class _Content:
    role: Role
    address: Place
    authority: _Der
    owner: _Der
    coordinators: _Der
    certificate: _Der
    key: _Der


@dataclass(frozen=True)
class Token:
    """What a token holds: where to dial, and the files of a kit of role `joining`."""

    address: str
    role: Role
    name: str
    expires: datetime
    files: dict[str, bytes] = field(repr=False)  # by name, in PEM form

    def __str__(self) -> str:
        """Write the line of text."""
        files = self.files
        content = _Content(
            role=self.role,
            address=self.address,
            authority=_packed(x509.load_pem_x509_certificate(files["ca.crt"]).public_bytes(Encoding.DER)),
            owner=_packed(
                load_pem_public_key(files["owner.pub"]).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            ),
            coordinators=_packed(x509.load_pem_x509_crl(files["crl.pem"]).public_bytes(Encoding.DER)),
            certificate=_packed(x509.load_pem_x509_certificate(files["tls.crt"]).public_bytes(Encoding.DER)),
            key=_packed(
                kit.private(_private(load_pem_private_key(files["tls.key"], password=None)), form=Encoding.DER)
            ),
        )
        return PREFIX + _packed(to_json(content))

    def check_date(self) -> None:
        """Refuse a token that has ended; raises IdentityError."""
        now = datetime.now(UTC)
        if self.expires < now:
            raise IdentityError(
                f"the token of {self.role} {self.name!r} ended at {self.expires:%Y-%m-%d %H:%M} UTC, and it is "
                f"{now:%Y-%m-%d %H:%M} by this machine's clock; ask the model owner for another"
            )

    def write(self, folder: Path) -> None:
        """Write the kit of role `joining`."""
        for name, data in self.files.items():
            kit.write(folder / name, data, secret=name == "tls.key")


def read(text: str) -> Token:
    """Read a token; raises InputError, with nothing of the token in it."""
    line = "".join(text.split())  # mails and terminals break long lines
    if not line.startswith(PREFIX):
        raise InputError(f"not a token: one begins with {PREFIX!r}, as `offsite pki token` prints it")
    try:
        if len(line) > MOST:
            raise ValueError
        content = from_json(_Content, _unpacked(line.removeprefix(PREFIX)), where="token")
        return _token(content)
    except (
        *UNREADABLE,
        InvalidSignature,
        InputError,
        IdentityError,
    ):  # nothing of what a parser says: a token is a secret
        raise InputError("the token is damaged; copy it whole, as `offsite pki token` printed it") from None


def _token(content: _Content) -> Token:
    certificate = x509.load_der_x509_certificate(_unpacked(content.certificate))
    authority = x509.load_der_x509_certificate(_unpacked(content.authority))
    coordinators = x509.load_der_x509_crl(_unpacked(content.coordinators))
    for one in (authority, certificate):
        one.verify_directly_issued_by(authority)
    key = _private(load_der_private_key(_unpacked(content.key), password=None))
    owner = load_der_public_key(_unpacked(content.owner))
    peer = Peer.of(certificate)
    if content.role not in MEMBERS or peer.role != "joining" or key.public_key() != certificate.public_key():
        raise ValueError
    if not isinstance(owner, ed25519.Ed25519PublicKey) or not coordinators.is_signature_valid(_public(authority)):
        raise ValueError
    files = {
        "ca.crt": authority.public_bytes(Encoding.PEM),
        "owner.pub": owner.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "crl.pem": coordinators.public_bytes(Encoding.PEM),
        "tls.crt": certificate.public_bytes(Encoding.PEM),
        "tls.key": kit.private(key),
    }
    return Token(content.address, content.role, peer.name, peer.expires, files)


def _public(authority: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = authority.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError
    return key


def _private(key: Any) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError
    return key


def _packed(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unpacked(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError from error
