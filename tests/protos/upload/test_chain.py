"""A chain of stages works on the change since the broadcast, and without any the adapter leaves as it is."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos import upload
from offsite.protos.documents import to_plain
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice
from offsite.protos.upload.base import At

KEY = bytes(range(32))
SCHEMA: Schema = {
    "w": Field("F32", (3,), Rule.MEAN),
    "index": Field("I32", (3,), Rule.FIXED, below=9),
}
INDEX = torch.tensor([1, 0, 8], dtype=torch.int32)
BROADCAST = {"w": torch.tensor([1.0, 2, 3]), "index": INDEX}
ADAPTER = {"w": torch.tensor([1.0, 4, 0]), "index": INDEX}


@dataclass(frozen=True)
class Affine:
    """Scale and shift in double precision."""

    scale: float
    shift: float
    name: ClassVar[str] = "affine"
    hides: ClassVar[bool] = False
    phases: ClassVar[tuple[str, ...]] = ("train",)
    noise: ClassVar[float] = 0.0

    def schema(self, given: Schema) -> Schema:
        return given | {"w": Field("F64", given["w"].shape, Rule.LOCAL)}

    def pack(self, change: Tensors, at: At) -> Tensors:
        return change | {"w": change["w"].double() * self.scale + self.shift}

    def unpack(self, packed: Tensors, at: At) -> Tensors:
        value = (packed["w"] - self.shift) / self.scale
        return packed | {"w": value.float() if at.schema["w"].dtype == "F32" else value}


def test_without_stages_the_adapter_leaves_as_it_is() -> None:
    assert upload.pack([], ADAPTER, BROADCAST, SCHEMA, key=KEY) is ADAPTER
    assert upload.unpack([], ADAPTER, BROADCAST, SCHEMA) is ADAPTER
    assert upload.schema_of([], SCHEMA) == SCHEMA


def test_the_change_is_packed_first_stage_first_and_unpacked_last_stage_first() -> None:
    chain = [Affine(2.0, 1.0), Affine(10.0, 0.0)]
    packed = upload.pack(chain, ADAPTER, BROADCAST, SCHEMA, key=KEY)
    assert packed["w"].tolist() == [10.0, 50.0, -50.0] and torch.equal(packed["index"], INDEX)
    assert upload.schema_of(chain, SCHEMA)["w"] == Field("F64", (3,), Rule.LOCAL)
    back = upload.unpack(chain, packed, BROADCAST, SCHEMA)
    assert torch.equal(back["w"], ADAPTER["w"]) and back["w"].dtype == torch.float32
    assert torch.equal(back["index"], INDEX)


def test_two_stages_of_one_name_draw_apart() -> None:
    once, twice = (
        upload.pack(upload.make([Choice(name="noise")] * count), ADAPTER, BROADCAST, SCHEMA, key=KEY)["w"]
        for count in (1, 2)
    )
    change = ADAPTER["w"] - BROADCAST["w"]
    assert not torch.allclose(twice - once, once - change, rtol=0.1)


def test_stages_are_made_of_choices_and_unknown_ones_are_named() -> None:
    (made,) = upload.make([Choice(name="noise", settings={"share": 0.5})])
    assert to_plain(made) == {"share": 0.5} and made.noise == 0.5
    with pytest.raises(InputError, match="upload: there is no stage 'salt'; known are noise"):
        upload.make([Choice(name="salt")])
    with pytest.raises(InputError, match="upload: stage 'noise' has no setting 'sigma'; its settings are share"):
        upload.make([Choice(name="noise", settings={"sigma": 1})])
