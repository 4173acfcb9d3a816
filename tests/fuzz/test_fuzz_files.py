"""Files: data of a site, tensors, manifests and kits, damaged or made up, are read or refused in a sentence."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offsite.coordinator.bundles import manifests
from offsite.emulator.examples import collect
from offsite.emulator.modality import default
from offsite.kernels.schema import Field, Rule, Schema
from offsite.protos import tensors
from offsite.protos.documents import to_plain
from offsite.protos.errors import IdentityError, InputError, MismatchError, OffsiteError
from offsite.protos.security import tokens
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority

from .hostile import as_json, changed, told, values
from .test_fuzz_documents import MANIFEST

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": "c"}
ROWS = st.lists(changed(ROW).map(as_json) | values.map(as_json) | st.binary(max_size=30), max_size=4).map(b"\n".join)
ENDINGS = ["jsonl", "json", "ndjson", "csv", "tsv", "txt", "parquet", "jsonl.gz", "JSONL"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(ending=st.sampled_from(ENDINGS), data=ROWS | st.binary(max_size=300))
def test_data(folder: Path, ending: str, data: bytes) -> None:
    file = folder / f"data.{ending}"
    file.write_bytes(data)
    for way in ("skip", "refuse"):
        try:
            collect(file, default(), odd_rows=way)  # type: ignore[arg-type]
        except ValueError as error:
            told(error)
    file.unlink()


def damaged(good: bytes, cuts: list[tuple[float, bytes]]) -> bytes:
    """Overwrite pieces of a good file, each at a share of its length; an empty piece cuts the rest off."""
    for share, piece in cuts:
        at = int(share * len(good))
        good = good[:at] + piece + good[at + len(piece) :] if piece else good[:at]
    return good


CUTS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), min_size=1, max_size=4)
NUMBERS = st.sampled_from([b"-1", b"9" * 30, b"NaN", b"[" * 300, b'"F32"', b'"x"', b"{}", b"1e9"])


@pytest.fixture(scope="module")
def update(folder: Path) -> bytes:
    tensors.save(folder / "good.safetensors", {"0.q.A": torch.ones(2, 3), "0.q.B": torch.ones(4, 2)})
    return (folder / "good.safetensors").read_bytes()


@given(cuts=CUTS, number=NUMBERS, where=st.integers(0, 40), swap=st.booleans())
def test_tensors(folder: Path, update: bytes, cuts: Any, number: bytes, where: int, swap: bool) -> None:
    length = int.from_bytes(update[:8], "little")
    header = update[8 : 8 + length]
    odd = header[:where] + number + header[where + 1 :]
    data = len(odd).to_bytes(8, "little") + odd + update[8 + length :] if swap else damaged(update, cuts)
    (folder / "update.safetensors").write_bytes(data)
    schema: Schema = {"0.q.A": Field("F32", (2, 3), Rule.MEAN), "0.q.B": Field("F32", (4, 2), Rule.MEAN)}
    for reading in (tensors.load, tensors.about, lambda path: tensors.check(path, schema, what="update")):
        try:
            reading(folder / "update.safetensors")
        except MismatchError as error:
            told(error)


@given(document=changed(to_plain(MANIFEST)).map(as_json) | st.binary(max_size=50))
def test_bundles(folder: Path, document: bytes) -> None:
    (folder / manifests.MANIFEST).write_bytes(document)
    try:
        manifests.describe(manifests.read(folder))
    except OffsiteError as error:
        told(error)


@pytest.fixture(scope="module")
def kit(folder: Path) -> Path:
    return Authority.create(folder / "pki").issue("coordinator", "coordinator")


@given(name=st.sampled_from(["tls.crt", "tls.key", "ca.crt", "owner.pub"]), cuts=CUTS)
def test_kits(kit: Path, name: str, cuts: Any) -> None:
    good = (kit / name).read_bytes()
    try:
        (kit / name).write_bytes(damaged(good, cuts))
        Identity.load(kit, expect="coordinator")
    except (IdentityError, InputError) as error:
        told(error)
    finally:
        (kit / name).write_bytes(good)


INDEX = {"certificates": [{"serial": "1f", "role": "site", "name": "a", "expires": "2030-01-01T00:00:00Z"}]}


@given(document=changed(INDEX).map(as_json) | st.binary(max_size=50))
def test_the_list_of_certificates(kit: Path, document: bytes) -> None:
    authority = kit.parent
    good = (authority / "index.json").read_bytes()
    try:
        (authority / "index.json").write_bytes(document)
        json.dumps([entry.status for entry in Authority.open(authority).entries()])
    except OffsiteError as error:
        told(error)
    finally:
        (authority / "index.json").write_bytes(good)


@pytest.fixture(scope="module")
def token(folder: Path) -> str:
    return str(Authority.create(folder / "tokens").token("site", "bank", address="127.0.0.1:1"))


@given(data=st.data(), cuts=CUTS)
def test_tokens(token: str, data: st.DataObject, cuts: Any) -> None:
    good = json.loads(base64.urlsafe_b64decode(token.removeprefix(tokens.PREFIX) + "=="))
    inner = base64.urlsafe_b64encode(as_json(data.draw(changed(good)))).decode()
    field = data.draw(st.sampled_from(["authority", "owner", "coordinators", "certificate", "key"]))
    piece = base64.urlsafe_b64encode(damaged(base64.urlsafe_b64decode(good[field] + "=="), cuts)).decode().rstrip("=")
    other = base64.urlsafe_b64encode(as_json({**good, field: piece})).decode()
    cut = damaged(token.encode(), cuts).decode(errors="replace")
    for text in (tokens.PREFIX + inner, tokens.PREFIX + other, cut, data.draw(st.text(max_size=50))):
        try:
            read = tokens.read(text)
        except InputError as error:
            told(error)
            assert good["key"][-20:] not in str(error), "it is a secret"
        else:
            assert str(tokens.read(str(read))) == str(read)
