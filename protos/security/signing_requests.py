"""Requests for a certificate (PKCS#10): a public key, and the proof that whoever asks has the private one.

Names in a request count for nothing: who asks is known by the certificate that the request comes with.
"""

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from offsite.protos.errors import InputError
from offsite.protos.security.certificates import UNREADABLE

MOST_BYTES = 2048  # of a request; one of ours has some 200


def new_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Ask for a certificate of a key (DER)."""
    unsigned = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return unsigned.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key that a certificate is asked for; raises InputError for any but a P-256 key that signed."""
    try:
        if len(request) > MOST_BYTES:
            raise ValueError
        read = x509.load_der_x509_csr(request)
        key = read.public_key()
        proved = read.is_signature_valid
    except UNREADABLE:
        raise InputError("not a signing request (PKCS#10, DER) of an offsite client") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError("the signing request is for a key of another kind; expected one on the curve P-256")
    if not proved:
        raise InputError("the signing request is not signed with the key that it is for")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Name a public key: SHA-256 of it, hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
