"""What is drawn in secret but not by chance: the same bytes from the same secret and names, and no others know them.

A work that is killed and done again must send the same bytes, so it draws nothing from the system's source of chance.
"""

import hmac
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from offsite.protos.documents import canonical

SECRET_BYTES = 32


def derive(secret: bytes, *names: str | int) -> bytes:
    """Return the key (32 bytes) that a secret gives for some names: HMAC-SHA256 of them as a JSON list."""
    return hmac.digest(secret, canonical(names), "sha256")


def stream(key: bytes) -> Callable[[int], bytes]:
    """Return a reader of the endless bytes that a key (32 bytes) gives: AES-256 in counter mode, from 0.

    A key may be read from once: its bytes hide nothing if they are used for two things.
    """
    encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    return lambda size: encryptor.update(bytes(size))
