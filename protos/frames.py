"""Pieces of files as they travel: in protobuf's own form, written and read without it.

Protobuf copies a piece's data into a message and, to send it, out of that again; at the other end likewise. These
copies cost more than all else that a transfer does. What other code writes is read too: by protobuf.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from google.protobuf.message import Message

from offsite.protos.fleet_pb2 import UploadHeader, UploadPart
from offsite.protos.transfer_pb2 import Chunk

# Field 1, `offset`; then field 2, `data`, whose length is a varint of always four bytes: the head of a Chunk and of an
# UploadPart alike.
_HEAD = struct.Struct("<BQB4s")
_OFFSET, _DATA = 0x09, 0x12


class Piece(NamedTuple):
    """A piece of a file; of a download, it may stand for one that the receiver holds."""

    offset: int
    data: bytes | memoryview = b""
    held: int | None = None


def write(message: Piece | Message) -> bytes:
    """Serialize what a transfer sends."""
    if not isinstance(message, Piece):
        return message.SerializeToString()
    if message.held is not None:
        return Chunk(offset=message.offset, held=message.held).SerializeToString()
    return b"".join((_HEAD.pack(_OFFSET, message.offset, _DATA, _varint(len(message.data))), message.data))


def read_chunk(message: bytes) -> Piece:
    """Read what a download sends."""
    if piece := _piece(message):
        return piece
    chunk = Chunk.FromString(message)
    return Piece(chunk.offset, chunk.data, chunk.held if chunk.HasField("held") else None)


def read_part(message: bytes) -> Piece | UploadHeader:
    """Read what an upload sends: its header, or a piece."""
    if piece := _piece(message):
        return piece
    part = UploadPart.FromString(message)
    return part.header if part.HasField("header") else Piece(part.offset, part.data)


_CODECS: dict[Any, Callable[[Any], Any]] = {
    Chunk.SerializeToString: write,
    Chunk.FromString: read_chunk,
    UploadPart.SerializeToString: write,
    UploadPart.FromString: read_part,
}


def lean(codecs: Mapping[str, Any]) -> dict[str, Any]:
    """Put this file's functions in the place of protobuf's among the arguments of generated code."""
    return {name: _CODECS.get(codec, codec) for name, codec in codecs.items()}


def _piece(message: bytes) -> Piece | None:
    """Read a message that holds a piece as `write` writes it."""
    if len(message) < _HEAD.size:
        return None
    first, offset, second, length = _HEAD.unpack_from(message)
    data = memoryview(message)[_HEAD.size :]
    return Piece(offset, data) if (first, second, length) == (_OFFSET, _DATA, _varint(len(data))) else None


def _varint(size: int) -> bytes:
    """Write a number below 2 ** 28 in four bytes, seven bits in each, all but the last marked as not the last."""
    return bytes((size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21 & 0x7F))
