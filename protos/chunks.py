"""Blobs on the wire: named by a digest that says its algorithm, cut into chunks. Imports no tensor library."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

CHUNK_BYTES = 1 << 20  # 1 MiB: the size at which a plain gRPC stream was fastest, and under its 4 MiB default limit
READ_BYTES = 1 << 17  # of a file at a time: with what is made of it, it stays in a core's own cache (L2)
WINDOW_BYTES = 8 * CHUNK_BYTES  # of an upload on its way: what its sender may be ahead of what is kept
# The one rule of what hangs: a call that gets no further for so long is given up by either end, to be made again or
# resumed. Who waits longer, or not as long, waits for something else: a person's restart, or a heartbeat's next turn.
STALL_S = 60.0
ALGORITHMS: dict[str, Any] = {"blake3": blake3, "sha256": hashlib.sha256}  # the first is used, all are read
DIGEST = re.compile(r"(blake3|sha256):([0-9a-f]{64})")


def hasher(algorithm: str = "blake3") -> Any:
    """Return a hash to `update` with bytes, in one thread: whoever hashes shares the machine with those who train."""
    return ALGORITHMS[algorithm]()


def digest_bytes(data: bytes) -> str:
    """Digest of bytes in memory, ``blake3:<hex>``."""
    return f"blake3:{blake3(data).hexdigest()}"


def digest_file(path: Path, *, like: str = "blake3:") -> str:
    """Digest of a file, read in pieces, by the algorithm of another digest (BLAKE3 unless given)."""
    algorithm = algorithm_of(like)
    whole, buffer = hasher(algorithm), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            whole.update(memoryview(buffer)[:size])
    return f"{algorithm}:{whole.hexdigest()}"


def is_digest(text: str) -> bool:
    """Tell whether a text is a well-formed digest; anything else must never become part of a path."""
    return DIGEST.fullmatch(text) is not None


def algorithm_of(digest: str) -> str:
    """Return what a digest was made with."""
    return digest.partition(":")[0]


def hex_of(digest: str, *, most: int = 64) -> str:
    """Return the digits of a digest, or the first of them, as they stand in the names of files."""
    return digest.partition(":")[2][:most]


def piece_digests(path: Path) -> list[bytes]:
    """Return the BLAKE3 digest (32 bytes) of each piece of CHUNK_BYTES of a file, the last of what is left."""
    return [blake3(data).digest() for _, data in read_chunks(path)]


def read_chunks(path: Path, *, offset: int = 0, size: int = CHUNK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, data) pieces of a file from an offset to its end."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while data := file.read(size):
            yield offset, data
            offset += len(data)
