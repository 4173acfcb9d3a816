"""A client's first look at a coordinator: a handshake of its own, since gRPC checks no revocation list.

What was checked is one certificate; the connection that follows trusts that certificate and nothing else.
"""

import base64
import os
import socket
import ssl
from contextlib import closing
from http.client import HTTPException, HTTPSConnection
from urllib.parse import SplitResult, unquote, urlsplit

from cryptography import x509

from offsite.protos.addresses import Address
from offsite.protos.errors import IdentityError
from offsite.protos.security import kit
from offsite.protos.security.identity import Identity
from offsite.protos.security.revocation import RevocationList

TIMEOUT_S = 20.0  # as gRPC gives a connection


def coordinator_certificate(address: Address, identity: Identity) -> bytes:
    """Shake hands over TLS 1.3 and return the certificate shown (PEM); raises ConnectionError that says why not.

    It is of the kit's authority, for this host, and holds now; whether it is revoked is left to `check_coordinator`.
    """
    try:
        with closing(_connection(address, _context(identity))) as connection:
            connection.connect()
            stream: ssl.SSLSocket = connection.sock
            certificate = stream.getpeercert(binary_form=True)
            assert certificate is not None, "the context asks for one"
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise ConnectionError("Handshake read failed") from None
    except ConnectionRefusedError:
        raise ConnectionError("Connection refused") from None
    except ConnectionError as error:
        raise ConnectionError(f"Handshake read failed: {error}") from None
    except socket.gaierror as error:
        raise ConnectionError(f"DNS resolution failed: {error.strerror}") from None
    except (OSError, ValueError, HTTPException) as error:
        raise ConnectionError(str(error)) from None
    return ssl.DER_cert_to_PEM_cert(certificate).encode()


def check_coordinator(certificate: bytes, identity: Identity) -> None:
    """Hold a coordinator's certificate (PEM) against the list in the kit as it is now; raises IdentityError."""
    path = identity.folder / "crl.pem"
    try:
        revocations = RevocationList.parse(path.read_bytes(), identity.authority, where=path)
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read: {error.strerror}") from None
    revocations.check_coordinator(x509.load_pem_x509_certificate(certificate), where=path)


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the chain, the dates, the purpose and the host
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=identity.authority.decode())
    context.set_alpn_protocols(["h2"])
    try:
        with kit.pair(identity.folder) as files:
            context.load_cert_chain(*files)
    except OSError as error:
        raise IdentityError(
            f"{identity.folder}: tls.crt and tls.key cannot be used: {error.strerror or error}; restore the kit"
        ) from None
    return context


def _connection(address: Address, context: ssl.SSLContext) -> HTTPSConnection:
    """Prepare a connection, through the proxy that gRPC will take."""
    proxy = urlsplit(os.environ.get(address.proxy(), ""))
    if proxy.scheme != "http" or not proxy.hostname:
        return HTTPSConnection(address.host, address.port, context=context, timeout=TIMEOUT_S)
    connection = HTTPSConnection(proxy.hostname, proxy.port or 443, context=context, timeout=TIMEOUT_S)
    connection.set_tunnel(address.host, address.port, _authorization(proxy))
    return connection


def _authorization(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
