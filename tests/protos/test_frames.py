"""Pieces on the wire: what is written without protobuf is protobuf's, and what protobuf writes is read."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError

from offsite.protos.chunks import CHUNK_BYTES
from offsite.protos.fleet_pb2 import UploadHeader, UploadPart
from offsite.protos.frames import Piece, lean, read_chunk, read_part, write
from offsite.protos.transfer_pb2 import Chunk

PIECES = [Piece(0), Piece(1, b"x"), Piece(2**64 - 1, b"\x09" * 200), Piece(5 << 30, bytes(CHUNK_BYTES))]


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: str(len(piece.data)))
def test_a_piece_is_protobuf_to_whoever_reads_or_writes_it_so(piece: Piece) -> None:
    written, fields = write(piece), {"offset": piece.offset, "data": piece.data}
    assert Chunk.FromString(written) == Chunk(**fields) and UploadPart.FromString(written) == UploadPart(**fields)
    for read, message in ((read_chunk, Chunk(**fields)), (read_part, UploadPart(**fields))):
        assert read(written) == read(message.SerializeToString()) == piece
    assert read_chunk(written).data.obj is written, "the data is where it came"  # type: ignore[union-attr]


def test_what_is_no_piece_goes_by_protobuf() -> None:
    held = Piece(CHUNK_BYTES, held=0)
    assert Chunk.FromString(write(held)).HasField("held") and read_chunk(write(held)) == held
    header = UploadHeader(digest="x" * 40)
    assert read_part(write(UploadPart(header=header))) == header
    for end in (-1, -2):
        with pytest.raises(DecodeError):
            read_part(write(PIECES[2])[:end])
    assert read_chunk(b"") == Piece(0)


def test_generated_code_is_given_what_does_not_copy() -> None:
    codecs: dict[str, Any] = {"one": Chunk.FromString, "two": UploadPart.SerializeToString, "three": repr}
    assert lean(codecs) == {"one": read_chunk, "two": write, "three": repr}
