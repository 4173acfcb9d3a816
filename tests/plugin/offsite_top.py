"""A stage of another package: of each tensor's change, only the largest values leave; the others are fed back.

The size changes, and integers travel: "0.q.A" leaves as "0.q.A.values" (n) and "0.q.A.index" (n).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from offsite.kernels.schema import FLOATS, Field, Rule, Schema, Tensors
from offsite.protos.upload import At


@dataclass(frozen=True)
class Top:
    """Keep a share of the values."""

    name: ClassVar[str] = "top"
    hides: ClassVar[bool] = False
    phases: ClassVar[tuple[str, ...]] = ("train",)
    whole: ClassVar[bool] = False
    noise: ClassVar[float] = 0.0
    feedback: ClassVar[bool] = True
    share: float = 0.25

    def schema(self, given: Schema) -> Schema:
        packed: Schema = {}
        for key, field in given.items():
            if not _moves(field):
                packed[key] = field
                continue
            if None in field.shape:
                raise ValueError(f"tensor {key} of shape {field.shape} is open: the values to keep cannot be counted")
            size = math.prod(side or 0 for side in field.shape)
            shape = (math.ceil(self.share * size),)
            packed[f"{key}.values"] = Field(field.dtype, shape, Rule.LOCAL, field.group)
            packed[f"{key}.index"] = Field("I32", shape, Rule.LOCAL, field.group, below=size)
        return packed

    def pack(self, change: Tensors, at: At) -> Tensors:
        packed: Tensors = {}
        for key, field in at.schema.items():
            if not _moves(field):
                packed[key] = change[key]
                continue
            flat = change[key].flatten()
            index = flat.abs().topk(math.ceil(self.share * flat.numel())).indices.sort().values
            packed |= {f"{key}.values": flat[index], f"{key}.index": index.int()}
        return packed

    def unpack(self, packed: Tensors, at: At) -> Tensors:
        change: Tensors = {}
        for key, field in at.schema.items():
            if not _moves(field):
                change[key] = packed[key]
                continue
            values, index = packed[f"{key}.values"], packed[f"{key}.index"].long()
            if len(index.unique()) < len(index):
                raise ValueError(f"tensor {key}.index names an entry twice")
            flat = values.new_zeros(math.prod(side or 0 for side in field.shape))
            change[key] = flat.scatter(0, index, values).reshape([side or 0 for side in field.shape])
        return change


def _moves(field: Field) -> bool:
    return field.dtype in FLOATS and field.rule is not Rule.FIXED
