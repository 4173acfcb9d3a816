"""Tensor files: whole or absent, and nothing but what was agreed gets in."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.kernels.schema import INTEGERS, Field, Rule, Schema, Tensors
from offsite.protos import tensors
from offsite.protos.chunks import CHUNK_BYTES, digest_bytes, digest_file, hex_of, is_digest, read_chunks
from offsite.protos.errors import MismatchError

INDEX = torch.tensor([1, 2])
GOOD = {
    "0.q.A": torch.arange(6.0).reshape(2, 3),
    "0.q.B": torch.zeros(4, 2),
    "0.index": torch.tensor([0, 8, 3], dtype=torch.int32),
}
SCHEMA: Schema = {
    "0.q.A": Field("F32", (2, 3), Rule.MEAN),
    "0.q.B": Field("F32", (4, 2), Rule.MEAN),
    "0.index": Field("I32", (3,), Rule.FIXED, below=9),
}


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors.save(tmp_path / "good", GOOD)
    tensors.check(tmp_path / "good", SCHEMA, fixed={"0.index": GOOD["0.index"]}, what="update")
    found = tensors.load(tmp_path / "good")
    assert found.keys() == GOOD.keys() and all(torch.equal(found[key], GOOD[key]) for key in GOOD)
    assert tensors.load(tmp_path / "good", ["0.q.B"]).keys() == {"0.q.B"}
    assert tensors.header(tmp_path / "good")["0.q.A"] == tensors.Entry(dtype="F32", shape=(2, 3))


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    tensors.save(tmp_path / "one", GOOD)
    tensors.save(tmp_path / "two", dict(reversed(GOOD.items())))
    assert digest_file(tmp_path / "one") == digest_file(tmp_path / "two")


def write(path: Path, schema: Schema, *parts: Tensors, **options: Any) -> Path:
    with tensors.writing(path, schema, **options) as add:
        for part in parts:
            add(part)
    return path


def test_written_as_they_come_tensors_make_the_file_that_they_make_at_once(tmp_path: Path) -> None:
    floats = {name: GOOD[name] for name in ("0.q.A", "0.q.B")} | {"none": torch.zeros(0, 3), "one": torch.tensor(2.0)}
    floats |= {'"ä\n': torch.arange(12.0).reshape(3, 4).T}
    schema: Schema = {name: Field("F32", tuple(tensor.shape), Rule.MEAN) for name, tensor in floats.items()}
    metadata = {"offsite": '{"round":1}'}
    tensors.save(tmp_path / "once", floats, metadata=metadata)
    parts = [{name: tensor} for name, tensor in reversed(floats.items())]
    written = write(tmp_path / "parts", schema, *parts, metadata=metadata)
    assert written.read_bytes() == (tmp_path / "once").read_bytes()
    assert write(tmp_path / "bare", schema, floats).read_bytes() != written.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("order", [1, -1])
def test_the_digest_of_what_is_written_is_that_of_the_file(tmp_path: Path, order: int) -> None:
    schema: Schema = {name: Field("F32", (50, 7), Rule.MEAN) for name in "abcd"}
    parts = [{name: torch.randn(50, 7)} for name in list(schema)[::order]]
    written = write(tmp_path / "file", schema, *parts, digest=tmp_path / "digest", metadata={"of": "this"})
    assert (tmp_path / "digest").read_text() == digest_file(written)
    with pytest.raises(ValueError, match="is missing"):
        write(tmp_path / "none", schema, parts[0], digest=tmp_path / "no digest")
    assert not (tmp_path / "no digest").exists()


def test_tensors_of_every_type_come_back_as_they_were_written(tmp_path: Path) -> None:
    types = {name: torch.arange(3).to(dtype) for name, dtype in tensors.DTYPES.items()}
    bounds = {name: 9 for name in INTEGERS}
    schema: Schema = {name: Field(name, (3,), Rule.LOCAL, below=bounds.get(name)) for name in types}
    tensors.check(write(tmp_path / "all", schema, types), schema, what="written")
    with tensors.reading(tmp_path / "all") as file:
        assert file.keys() == types.keys() == tensors.load(tmp_path / "all").keys()
        assert all(torch.equal(file[name], types[name]) and file[name].dtype == types[name].dtype for name in types)
    data = (tmp_path / "all").read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begins = {name: head[name]["data_offsets"][0] for name in types}
    assert len(data) % 8 == sum(tensor.nbytes for tensor in types.values()) % 8
    assert not any(begin % types[name].itemsize for name, begin in begins.items()), "they are aligned"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"0.q.A": GOOD["0.q.A"]}, "file: tensor 0.index is missing .2 of 3 are"),
        (GOOD | {"0.q.C": torch.zeros(1)}, r"tensor 0.q.C is torch.float32 \[1\], agreed was None"),
        (GOOD | {"0.q.B": torch.zeros(2, 4)}, r"tensor 0.q.B is torch.float32 \[2, 4\], agreed was Field"),
        (GOOD | {"0.q.B": torch.zeros(4, 2).double()}, r"tensor 0.q.B is torch.float64 \[4, 2\], agreed was Field"),
    ],
)
def test_no_file_is_left_of_tensors_that_are_not_the_schemas(tmp_path: Path, part: Tensors, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "file", SCHEMA, part)
    with pytest.raises(ValueError, match="tensor 0.q.A was written before"):
        write(tmp_path / "file", SCHEMA, GOOD, {"0.q.A": GOOD["0.q.A"]})
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"0.q.A": GOOD["0.q.A"]}, "tensor 0.index is missing"),
        (GOOD | {"1.q.A": torch.zeros(1)}, "tensor 1.q.A was not asked for"),
        (GOOD | {"0.q.B": torch.zeros(2, 4)}, r"tensor 0.q.B is F32 \[2, 4\], expected F32 \[4, 2\]"),
        (GOOD | {"0.q.B": torch.zeros(4, 2).half()}, r"tensor 0.q.B is F16 \[4, 2\], expected F32"),
        (GOOD | {"0.q.B": torch.full((4, 2), float("nan"))}, "tensor 0.q.B holds 8 values that are not finite"),
        (GOOD | {"0.q.A": torch.tensor([[0.0, 1, float("inf")], [0, 0, 0]])}, "tensor 0.q.A holds 1 values"),
        (GOOD | {"0.index": torch.tensor([0.0, 8, 3])}, r"tensor 0.index is F32 \[3\], expected I32"),
        (GOOD | {"0.index": torch.tensor([-1, 9, 8]).int()}, "tensor 0.index holds 2 values that are not in 0..8"),
        (GOOD | {"0.index": torch.tensor([0, 8, 4]).int()}, "tensor 0.index is not the one that all sites have"),
    ],
)
def test_what_does_not_match_is_named(tmp_path: Path, bad: dict[str, torch.Tensor], words: str) -> None:
    tensors.save(tmp_path / "bad", bad)
    with pytest.raises(MismatchError, match=f"update: {words}"):
        tensors.check(tmp_path / "bad", SCHEMA, fixed={"0.index": GOOD["0.index"]}, what="update")


def test_a_distance_is_the_norm_of_the_change_over_all_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    long = torch.randn(3, tensors.PIECE_BYTES // 4 + 5, generator=generator)  # some pieces, the last a short one
    start = {"b": torch.zeros(2, 2), "a": long, "none": torch.zeros(0, 4), "one": torch.tensor(2.0)}
    update = {"b": torch.eye(2), "a": long + 0.5, "none": torch.zeros(0, 4), "one": torch.tensor(-1.0)}
    tensors.save(tmp_path / "start", start, metadata={"any": "thing"})
    tensors.save(tmp_path / "update", update)
    flat = torch.cat([(update[name] - start[name]).double().flatten() for name in start])
    assert tensors.distance(tmp_path / "update", tmp_path / "start") == pytest.approx(float(flat.norm()), rel=1e-12)
    assert tensors.distance(tmp_path / "start", tmp_path / "start") == 0
    with tensors.reading(tmp_path / "update") as file:
        assert all(torch.equal(file[name], update[name]) for name in update)
        assert file.entries == tensors.Held(update).entries
    in_memory = tensors.gap(tensors.Held(update), tensors.Held(start))
    assert in_memory == pytest.approx(float(flat.norm()), rel=1e-12)
    mixed = tensors.gap(tensors.Held(update | {"x": INDEX}), tensors.Held(start | {"x": INDEX}))
    assert mixed == tensors.distance(tmp_path / "update", tmp_path / "start"), "bit for bit"
    others = [{name: start[name] + scale for name in start} for scale in (0.25, 3.0, float("nan"))]
    columns = {name: torch.stack([one[name] for one in (update, *others)]) for name in start}
    at_once = tensors.gaps(columns | {"x": INDEX.expand(4, -1)}, start | {"x": INDEX})
    assert at_once[:3] == pytest.approx(
        [tensors.gap(tensors.Held(one), tensors.Held(start)) for one in (update, *others[:2])]
    )
    assert math.isnan(at_once[3])
    for row, norm in enumerate(at_once[:3]):
        assert tensors.gaps({name: column[row : row + 1] for name, column in columns.items()}, start) == [norm]


def test_a_fault_in_the_last_value_of_a_tensor_of_many_pieces_is_seen(tmp_path: Path) -> None:
    size = tensors.PIECE_BYTES
    long = {"a": torch.ones(size), "index": torch.arange(size), "z": torch.ones(3).bfloat16()}
    schema: Schema = {
        "a": Field("F32", (size,), Rule.MEAN),
        "index": Field("I64", (size,), Rule.FIXED, below=size),
        "z": Field("BF16", (3,), Rule.MEAN),
    }
    fixed = {"index": torch.arange(size)}
    tensors.save(tmp_path / "good", long)
    tensors.check(tmp_path / "good", schema, fixed=fixed, what="update")
    long["index"][-1] = 0
    tensors.save(tmp_path / "bad", long)
    with pytest.raises(MismatchError, match="tensor index is not the one that all sites have"):
        tensors.check(tmp_path / "bad", schema, fixed=fixed, what="update")
    long["a"][-1] = float("nan")
    tensors.save(tmp_path / "bad", long)
    with pytest.raises(MismatchError, match="tensor a holds 1 values that are not finite"):
        tensors.check(tmp_path / "bad", schema, what="update")
    assert not math.isfinite(tensors.distance(tmp_path / "bad", tmp_path / "good"))


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04.", b"PK\x03\x04" + bytes(100), (2).to_bytes(8, "little") + b"[]", b"\xff" * 64]
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "odd").write_bytes(data)
    with pytest.raises(MismatchError):
        tensors.check(tmp_path / "odd", SCHEMA, what="update")


def test_chunks_cover_a_file_from_any_offset(tmp_path: Path) -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 128)
    (tmp_path / "file").write_bytes(data)
    for offset in (0, 1, CHUNK_BYTES, len(data) - 1, len(data)):
        pieces = list(read_chunks(tmp_path / "file", offset=offset))
        assert b"".join(piece for _, piece in pieces) == data[offset:]
        assert all(data[at : at + len(piece)] == piece for at, piece in pieces)
    assert digest_bytes(data) == digest_file(tmp_path / "file")


def test_a_digest_says_its_algorithm_and_those_of_older_journals_are_still_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    blake3 = "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"  # of the algorithm's paper
    sha256 = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180
    assert digest_bytes(b"abc") == digest_file(tmp_path / "file") == blake3
    assert digest_file(tmp_path / "file", like="sha256:" + "0" * 64) == sha256
    assert is_digest(blake3) and is_digest(sha256) and hex_of(sha256, most=4) == "ba78"


@pytest.mark.parametrize(
    "text", ["", "sha256:", "blake3:" + "G" * 64, "md5:" + "a" * 64, "blake3:" + "a" * 64 + "\n", "../" + "a" * 68]
)
def test_only_digests_are_digests(text: str) -> None:
    assert not is_digest(text) and is_digest(digest_bytes(b""))


def test_what_a_file_says_of_itself_is_fit_for_a_terminal(tmp_path: Path) -> None:
    tensors.save(tmp_path / "good", {"a": torch.ones(2)})
    for old, new in ((b'"F32"', '"\u202e"'.encode()), (b'"a"', b'"\x7f"')):
        (tmp_path / "odd").write_bytes((tmp_path / "good").read_bytes().replace(old, new, 1))
        with pytest.raises(MismatchError) as told:
            tensors.check(tmp_path / "odd", {"a": Field("F32", (2,), Rule.MEAN)}, what="update")
        assert str(told.value).isprintable()
