"""The certificates Offsite makes, and the one thing it reads from a certificate: whose it is.

A certificate says whose it is in a URI among its alternative names, `offsite://<role>/<name>`.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple, get_args

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from offsite.protos.errors import IdentityError, InputError

Role = Literal["coordinator", "site", "owner", "researcher", "auditor", "joining"]
PEOPLE: tuple[Role, ...] = ("owner", "researcher", "auditor")
MEMBERS: tuple[Role, ...] = ("site", *PEOPLE)  # who may join by a token, and renew by themselves
ROLES: tuple[Role, ...] = ("coordinator", *MEMBERS)  # of kits; who holds a token is `joining` and may ask for one

# What is raised for certificates, lists, requests and keys that are damaged, or of a kind that nobody uses.
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}[A-Za-z0-9_])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62}[A-Za-z0-9])?)*"
)
_URI = re.compile(rf"offsite://({'|'.join(get_args(Role))})/({_NAME.pattern})")
BACKDATED = timedelta(minutes=5)  # another machine's clock may be this much behind

_USES = {
    "coordinator": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
} | {role: [ExtendedKeyUsageOID.CLIENT_AUTH] for role in (*MEMBERS, "joining")}


@dataclass(frozen=True)
class Peer:
    """Who the other end of a connection has proved to be."""

    role: Role
    name: str
    serial: int
    expires: datetime

    @classmethod
    def of(cls, certificate: x509.Certificate) -> "Peer":
        """Read whose a certificate is; raises IdentityError where it holds no role."""
        role, name = subject(certificate)
        return cls(role, name, certificate.serial_number, certificate.not_valid_after_utc)

    def check_date(self) -> None:
        """Refuse a certificate that has expired: the handshake looked once, but a connection may outlive it."""
        if self.expires < datetime.now(UTC):
            raise IdentityError(
                f"the certificate of {self.role} {self.name!r} expired on {self.expires:%Y-%m-%d}; "
                "ask the model owner for a token, and join again"
            )


class Issuer(NamedTuple):
    """An authority's certificate and the key that signs for it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def subject(certificate: x509.Certificate) -> tuple[Role, str]:
    """Read the role and the name a certificate was issued to; raises IdentityError where it holds none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        names = x509.SubjectAlternativeName([])
    matches = [_URI.fullmatch(uri) for uri in names.get_values_for_type(x509.UniformResourceIdentifier)]
    if len(matches) != 1 or matches[0] is None:
        raise IdentityError("the certificate names no role: it was not issued by `offsite pki`")
    role: Role = next(role for role in get_args(Role) if role == matches[0][1])
    return role, matches[0][2]


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the hosts that a certificate names."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return *names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))


def either(roles: Sequence[Role]) -> str:
    """Write roles for people: "owner, researcher or auditor"."""
    *most, last = roles
    return f"{', '.join(most)} or {last}" if most else last


def check_name(name: str) -> None:
    """Refuse a name that could not be part of a path and a URI; raises InputError."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a name: write 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
        )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise InputError(
                f"{host!r} is not a host: write a DNS name or an IP address, without port or scheme"
            ) from None
        return x509.DNSName(host)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _unsigned(
    common_name: str,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    serial: int,
    start: datetime,
    end: datetime,
    authority: bool,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_distinguished(common_name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(start - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(_key_usage(authority=authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _distinguished(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def authority_key_identifier(issuer: Issuer) -> x509.AuthorityKeyIdentifier:
    """Say which key signs."""
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())


def new_issuer(name: str, *, start: datetime, end: datetime) -> Issuer:
    """Make an authority: an EC P-256 key and a certificate it signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject, serial = _distinguished(name), x509.random_serial_number()
    unsigned = _unsigned(name, subject, key.public_key(), serial=serial, start=start, end=end, authority=True)
    return Issuer(unsigned.sign(key, hashes.SHA256()), key)


def new_certificate(
    issuer: Issuer,
    key: ec.EllipticCurvePublicKey,
    role: Role,
    name: str,
    *,
    hosts: Sequence[str] = (),
    serial: int = 0,
    start: datetime,
    end: datetime,
) -> x509.Certificate:
    """Certify that a key belongs to a role and a name, and answers at these hosts; raises InputError for a host.

    Its serial number is drawn, unless one is given.
    """
    uri = x509.UniformResourceIdentifier(f"offsite://{role}/{name}")
    names = x509.SubjectAlternativeName([uri, *(_host(host) for host in hosts)])
    serial, subject = serial or x509.random_serial_number(), issuer.certificate.subject
    return (
        _unsigned(name, subject, key, serial=serial, start=start, end=end, authority=False)
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage(_USES[role]), critical=False)
        .add_extension(authority_key_identifier(issuer), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )
