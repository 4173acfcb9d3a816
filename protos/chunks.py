"""Blobs on the wire: named by their SHA-256, cut into chunks, resumed by offset. Imports no tensor library."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20  # 1 MiB: the size at which a plain gRPC stream was fastest, and under its 4 MiB default limit


def digest_bytes(data: bytes) -> str:
    """Digest of bytes in memory, ``sha256:<hex>``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def is_digest(text: str) -> bool:
    """Tell whether a text is a well-formed digest; anything else must never become part of a path."""
    return len(text) == 71 and text.startswith("sha256:") and all(c in "0123456789abcdef" for c in text[7:])


def read_chunks(path: Path, *, offset: int = 0, size: int = CHUNK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, data) pieces of a file from an offset to its end."""
    with path.open("rb") as file:
        file.seek(offset)
        while data := file.read(size):
            yield offset, data
            offset += len(data)
