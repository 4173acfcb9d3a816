"""A chain of stages works on the change since the broadcast, and without any the adapter leaves as it is."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from offsite.kernels.schema import Field, Rule, Schema, TensorMap, Tensors
from offsite.protos import upload
from offsite.protos.documents import to_plain
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice
from offsite.protos.upload.base import At, Stage

KEY = bytes(range(32))
SCHEMA: Schema = {
    "w": Field("F32", (3,), Rule.MEAN),
    "index": Field("I32", (3,), Rule.FIXED, below=9),
}
INDEX = torch.tensor([1, 0, 8], dtype=torch.int32)
BROADCAST = {"w": torch.tensor([1.0, 2, 3]), "index": INDEX}
ADAPTER = {"w": torch.tensor([1.0, 4, 0]), "index": INDEX}
PAIRS: Schema = {
    f"{group}.{factor}": Field("F32", (2, 2), Rule.PRODUCT, f"{group}") for group in range(50) for factor in "AB"
}


class Plain:
    """What most stages are."""

    hides: ClassVar[bool] = False
    phases: ClassVar[tuple[str, ...]] = ("train",)
    whole: ClassVar[bool] = False
    noise: ClassVar[float] = 0.0
    feedback: ClassVar[bool] = False

    def schema(self, given: Schema) -> Schema:
        return given

    def pack(self, change: Tensors, at: At) -> Tensors:
        return change

    def unpack(self, packed: Tensors, at: At) -> Tensors:
        return packed


@dataclass(frozen=True)
class Affine(Plain):
    """Scale and shift in double precision."""

    scale: float
    shift: float
    name: ClassVar[str] = "affine"

    def schema(self, given: Schema) -> Schema:
        return given | {key: Field("F64", of.shape, Rule.LOCAL) for key, of in given.items() if key == "w"}

    def pack(self, change: Tensors, at: At) -> Tensors:
        return {key: value.double() * self.scale + self.shift if key == "w" else value for key, value in change.items()}

    def unpack(self, packed: Tensors, at: At) -> Tensors:
        def back(value: torch.Tensor) -> torch.Tensor:
            value = (value - self.shift) / self.scale
            return value.float() if at.schema["w"].dtype == "F32" else value

        return {key: back(value) if key == "w" else value for key, value in packed.items()}


@dataclass(frozen=True)
class Clip(Plain):
    """Bound the norm of the whole change."""

    most: float
    name: ClassVar[str] = "clip"
    whole: ClassVar[bool] = True

    def pack(self, change: Tensors, at: At) -> Tensors:
        norm = float(torch.cat([value.flatten() for value in change.values()]).norm())
        return {key: value * min(1.0, self.most / norm) for key, value in change.items()}


@dataclass(frozen=True)
class Rounded(Plain):
    """Keep whole numbers."""

    name: ClassVar[str] = "rounded"
    feedback: ClassVar[bool] = True
    given: list[Tensors] = field(default_factory=list)

    def pack(self, change: Tensors, at: At) -> Tensors:
        self.given.append(change)
        return {key: value if at.schema[key].below else value.trunc() for key, value in change.items()}


def pack(stages: Sequence[Stage], adapter: TensorMap, broadcast: TensorMap, schema: Schema, **more: Any) -> Tensors:
    """All that leaves the site."""
    packed = upload.pack(stages, adapter, broadcast, schema, key=KEY, **more)
    return {key: tensor for part in packed for key, tensor in part.update.items()}


def test_without_stages_the_adapter_leaves_as_it_is() -> None:
    packed = pack([], ADAPTER, BROADCAST, SCHEMA)
    assert packed.keys() == ADAPTER.keys() and all(packed[key] is ADAPTER[key] for key in ADAPTER)
    assert upload.unpack([], ADAPTER, BROADCAST, SCHEMA) is ADAPTER
    assert upload.schema_of([], SCHEMA) == SCHEMA and upload.residual_of([], SCHEMA) == {}


def test_the_change_is_packed_first_stage_first_and_unpacked_last_stage_first() -> None:
    chain = [Affine(2.0, 1.0), Affine(10.0, 0.0)]
    packed = pack(chain, ADAPTER, BROADCAST, SCHEMA)
    assert packed["w"].tolist() == [10.0, 50.0, -50.0] and torch.equal(packed["index"], INDEX)
    assert upload.schema_of(chain, SCHEMA)["w"] == Field("F64", (3,), Rule.LOCAL)
    back = upload.unpack(chain, packed, BROADCAST, SCHEMA)
    assert torch.equal(back["w"], ADAPTER["w"]) and back["w"].dtype == torch.float32
    assert torch.equal(back["index"], INDEX)


def test_two_stages_of_one_name_draw_apart() -> None:
    once, twice = (
        pack(upload.make([Choice(name="noise")] * count), ADAPTER, BROADCAST, SCHEMA)["w"] for count in (1, 2)
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


class Counted(Mapping[str, torch.Tensor]):
    """Tensors that are made when they are asked for, and how many of them were in memory at once."""

    def __init__(self, schema: Schema) -> None:
        self._schema, self._made, self.most = schema, list[Any](), 0

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.ones([size or 0 for size in self._schema[name].shape])
        self._made = [*filter(lambda made: made() is not None, self._made), weakref.ref(tensor)]
        self.most = max(self.most, len(self._made))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._schema)

    def __len__(self) -> int:
        return len(self._schema)


def test_no_more_than_two_groups_are_in_memory_at_either_end() -> None:
    adapter, residual = Counted(PAIRS), Counted(upload.residual_of([Rounded()], PAIRS))
    for part in upload.pack([Rounded()], adapter, Counted(PAIRS), PAIRS, key=KEY, residual=residual):
        assert len(part.update) == len(part.residual) == 2
    packed, start = Counted(PAIRS), Counted(PAIRS)
    for unpacked, value in (
        (upload.unpack([Plain()], packed, start, PAIRS), 2.0),  # type: ignore[list-item]
        (upload.unpack([Plain()], packed, None, PAIRS), 1.0),  # type: ignore[list-item]
    ):
        assert list(unpacked) == sorted(PAIRS) and all(float(unpacked[name].mean()) == value for name in unpacked)
    assert all(0 < counted.most <= 4 for counted in (adapter, residual, packed, start))


def test_a_stage_that_must_see_all_groups_does(top: Any) -> None:
    adapter = {name: torch.full((2, 2), 3.0) for name in PAIRS}
    start = {name: torch.zeros(2, 2) for name in PAIRS}
    (part,) = upload.pack([Clip(10.0), top()], adapter, start, PAIRS, key=KEY)
    unpacked = upload.unpack([Clip(10.0)], pack([Clip(10.0)], adapter, start, PAIRS), start, PAIRS)
    change = torch.cat([unpacked[name].flatten() for name in unpacked])
    assert float(change.norm()) == pytest.approx(10.0) and len(change) == 400
    assert len(part.update) == 200 and upload.schema_of([Clip(10.0), top()], PAIRS).keys() == part.update.keys()


def test_a_stage_that_packs_two_groups_into_one_tensor_is_refused() -> None:
    class Flat(Plain):
        def schema(self, given: Schema) -> Schema:
            return {"all": next(iter(given.values()))}

    with pytest.raises(ValueError, match="two groups are packed into one tensor all; a stage names"):
        upload.schema_of([Flat()], PAIRS)  # type: ignore[list-item]


def rounds(stages: Sequence[Stage], changes: Sequence[Tensors], schema: Schema) -> tuple[Tensors, Tensors]:
    """What comes of the updates of several rounds in all, and what stays at the site after the last."""
    start = {key: torch.zeros_like(tensor) for key, tensor in changes[0].items()}
    total, residual = dict(start), Tensors()
    for change in changes:
        packed = list(upload.pack(stages, change, start, schema, key=KEY, residual=residual))
        sent = {key: tensor for part in packed for key, tensor in part.update.items()}
        residual = {key: tensor for part in packed for key, tensor in part.residual.items()}
        back = upload.unpack(stages, sent, start, schema)
        total = {key: total[key] + back[key] for key in total}
    return total, residual


def test_what_was_sent_and_what_stays_are_the_changes_together_to_the_bit(top: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    schema: Schema = {"w": Field("F32", (40, 5), Rule.MEAN), "one": Field("F32", (), Rule.MEAN)}
    changes = [
        {key: torch.randint(-99, 99, of.shape, generator=generator) / 8 for key, of in schema.items()} for _ in range(4)
    ]  # sums of a few eighths are exact
    for stages in ([top()], [Rounded(), top(share=0.1)]):
        total, residual = rounds(stages, changes, schema)
        for key in schema:
            stays = sum(tensor for name, tensor in residual.items() if name.endswith(f".{key}"))
            assert torch.equal(total[key] + stays, sum(change[key] for change in changes)), key  # type: ignore[arg-type]
        assert bool(residual[f"{len(stages) - 1}.w"].any())


def test_each_stage_feeds_back_its_own_and_nothing_of_what_is_fixed_or_local() -> None:
    first, second = Rounded(), Rounded()
    chain: list[Stage] = [first, Affine(0.5, 0.0), second]
    assert upload.residual_of(chain, SCHEMA) == {"0.w": SCHEMA["w"]}
    assert upload.residual_of([first, second], SCHEMA) == {"0.w": SCHEMA["w"], "1.w": SCHEMA["w"]}
    residual = {"0.w": torch.tensor([0.25, 0.75, 0.0])}
    packed = pack(chain, ADAPTER, BROADCAST, SCHEMA, residual=residual)
    assert first.given[-1]["w"].tolist() == [0.25, 2.75, -3.0] and torch.equal(packed["index"], INDEX)
    assert second.given[-1]["w"].tolist() == [0.0, 1.0, -1.5]
    with pytest.raises(ValueError, match="stage rounded is to feed back .* put it before the stages that choose"):
        upload.schema_of(chain, SCHEMA)
