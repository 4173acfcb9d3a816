"""Mutual TLS over gRPC: credentials from a kit, who the other end is, and why no connection came about."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import grpc
from cryptography import x509

from offsite.protos.errors import IdentityError, OffsiteError, UnreachableError
from offsite.protos.security.certificates import Peer
from offsite.protos.security.identity import Identity

__all__ = ["Identity", "Peer", "channel_credentials", "explain", "peer", "server_credentials"]


def server_credentials(identity: Identity, newest: Callable[[], Identity] | None = None) -> grpc.ServerCredentials:
    """Credentials of a server that lets in only those its own authority has certified.

    `newest` is asked at each handshake, in a thread of gRPC's, for what is shown from then on; it must not raise.
    """
    shown = identity

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = (shown.key, shown.certificate)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=shown.authority)

    def change() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        before, shown = shown, newest() if newest else shown
        return configuration() if shown.certificate != before.certificate else None

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        change,  # type: ignore[arg-type]  # None changes nothing
        require_client_authentication=True,
    )


def channel_credentials(identity: Identity, *, pinned: bytes = b"") -> grpc.ChannelCredentials:
    """Credentials of a client that shows its certificate and trusts its own authority; of that, one certificate (PEM).

    A certificate that is no authority's vouches for nobody but its holder.
    """
    return grpc.ssl_channel_credentials(pinned or identity.authority, identity.key, identity.certificate)


def peer(auth_context: Mapping[str, Iterable[bytes]]) -> Peer:
    """Read who is calling from a gRPC auth context; raises IdentityError for one whose certificate does not hold."""
    for pem in auth_context.get("x509_pem_cert", ()):
        caller = _peer(pem)
        caller.check_date()
        return caller
    raise IdentityError("the caller showed no certificate; connect over TLS with a kit from the model owner")


@lru_cache(maxsize=4096)
def _peer(pem: bytes) -> Peer:
    """Read whose a certificate is; the same ones come again with every call."""
    return Peer.of(x509.load_pem_x509_certificate(pem))


# What the details of an UNAVAILABLE call, or of a handshake of Python's own, hold, and what it means. A server never
# says why it refuses a client: in TLS 1.3 the client's own handshake is over by then, and gRPC sends no alert: a closed
# socket is all the client sees.
_NOT_ACCEPTED = {
    r"certificate has expired": "the coordinator's certificate has expired; its owner issues a new kit with "
    "`offsite pki issue`",
    r"certificate is not yet valid": "the coordinator's certificate is not valid yet; check this machine's clock",
    r"unsu(pported|itable) certificate purpose": "by its certificate, what answers is not a coordinator; "
    "check the address",
    r"Hostname Verification Check failed|(Hostname|IP address) mismatch": "the coordinator's certificate does not name "
    "this host; its owner issues one that does with `offsite pki issue --host`",
    r"CERTIFICATE_VERIFY_FAILED|BAD_SIGNATURE": "the coordinator's certificate was not issued by this kit's ca.crt; "
    "check the address, or ask the model owner for a kit of the same authority",
    r"WRONG_VERSION_NUMBER|record layer failure": "what answers there does not speak TLS, so it cannot prove who it "
    "is; check the address",
    r"Tls handshake failed|^\[SSL": "the TLS handshake failed; check the address and the kit",
    r"last error: UNAVAILABLE: \S+: Socket closed$": "the coordinator closed the "
    "connection instead of accepting this kit's certificate: it has expired or is of another authority; "
    "the coordinator's log says which",
}
_NOT_REACHED = {
    r"Connection refused": "nothing listens there; check the address and that the coordinator is up",
    r"errors resolving|DNS resolution failed": "the host name is not known; check the address",
    r"timed out": "nothing answers there in time; check the address and any firewall on the way",
    r"Handshake read failed": "the connection was closed before the coordinator showed a certificate; check the "
    "address and any proxy on the way",
}


def explain(details: str, target: str) -> OffsiteError:
    """Turn the details of a call that ended UNAVAILABLE into the error to raise, one sentence on the likely cause.

    IdentityError where one end did not accept the other's certificate, UnreachableError otherwise. A coordinator
    killed at the moment it is dialled can look like one that refuses: a client that was let in before should ask again.
    """
    for pattern, cause in _NOT_ACCEPTED.items():
        if re.search(pattern, details):
            return IdentityError(f"{target}: {cause}")
    for pattern, cause in _NOT_REACHED.items():
        if re.search(pattern, details):
            return UnreachableError(f"{target}: {cause}")
    return UnreachableError(f"{target}: the coordinator does not answer: {details}")
