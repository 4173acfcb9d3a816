"""What tensors are and what may be done with them: the schema of an adapter, or of what is made of one on its way.

A method declares the schema of its adapters, a strategy the rules that it folds, and whoever checks a file asks the
schema. It brings no tensor library, so that a server that only asks how large an update may be needs none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = dict[str, "Tensor"]
TensorMap: TypeAlias = Mapping[str, "Tensor"]  # perhaps of a file, where each is read when it is asked for
Tier: TypeAlias = str  # sites of one tier start a round from the same tensors

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a value, by safetensors' names
INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


class Rule(StrEnum):
    """How the tensors of one name become one, over the sites of a round."""

    MEAN = "mean"  # the weighted mean of each value
    PRODUCT = "product"  # two factors, of which the product B @ A is averaged
    UNION = "union"  # entries of a sparse matrix and where they are, which sites choose; the matrix is averaged
    VOTE = "vote"  # packed bits, each of which becomes what most sites, by weight, have it to be
    REQUANTISE = "requantise"  # packed codes, and the line that takes them to values; the values are averaged
    SUM = "sum"  # the sum of each value, in which a site counts as much as it has measured
    FIXED = "fixed"  # the same at every site and in every round, as an index is
    LOCAL = "local"  # a site's own, of which the coordinator makes others before they are folded


@dataclass(frozen=True)
class Field:
    """One tensor of a schema; raises ValueError if it could not be folded as its rule says."""

    dtype: str  # as safetensors writes it: "F32", "I64"
    shape: tuple[int | None, ...]  # None: sites of different tiers may differ here
    rule: Rule
    group: str = ""  # of tensors that are folded together, as the two factors of a product are
    below: int | None = None  # of integers, which are at least 0: what all of them are less than
    bits: int | None = None  # of packed values, the lowest of a byte first: how many they take; any others are zero
    width: int = 1  # of packed values: the bits of one
    private: int = 0  # of the first dimension: how many, the last, no two layers share, so that a task may own them

    def __post_init__(self) -> None:
        """Refuse a dtype without a size, integers without a bound, and a rule that the values do not allow."""
        if self.dtype not in FLOATS | INTEGERS:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(FLOATS | INTEGERS)}")
        coded = self.rule is Rule.REQUANTISE and self.dtype in INTEGERS
        if (self.bits is not None) != (coded or self.rule is Rule.VOTE):
            raise ValueError(f"bits are voted on or codes, and nothing else is: bits = {self.bits}, {self.rule}")
        if self.width != 1 and (not coded or self.width < 1 or (self.bits or 0) % self.width):
            raise ValueError(f"{self.bits} bits are not values of {self.width} bits each, {self.rule}")
        if self.bits is not None and (self.dtype, self.shape, self.below) != ("U8", (-(-self.bits // 8),), None):
            raise ValueError(
                f"{self.bits} packed bits are U8 ({-(-self.bits // 8)},) without a bound, not {self.dtype} "
                f"{self.shape} below {self.below}"
            )
        if self.dtype in INTEGERS and self.rule in (Rule.MEAN, Rule.PRODUCT, Rule.SUM):
            raise ValueError(f"integers ({self.dtype}) are fixed, local, of a union or packed bits, not {self.rule}")
        if self.dtype in INTEGERS and self.below is None and self.bits is None:
            raise ValueError(f"integers ({self.dtype}) are below something, not {self.below}")
        if self.dtype in FLOATS and self.below is not None:
            raise ValueError(f"only integers have a bound: below = {self.below} of {self.dtype}")
        if self.private and (self.rule is not Rule.MEAN or not 0 < self.private <= (self.shape[0] or 0)):
            raise ValueError(
                f"{self.private} private rows of {self.shape}, {self.rule}: some of those that are averaged"
            )
        if any(size is not None and size < 0 for size in self.shape):
            raise ValueError(f"shape {self.shape} has a negative size")

    @property
    def size_bytes(self) -> int:
        """Bytes that the values take; raises ValueError while a size is open."""
        if None in self.shape:
            raise ValueError(f"shape {self.shape} is open: settle it first")
        return prod(size for size in self.shape if size is not None) * (FLOATS | INTEGERS)[self.dtype]

    @property
    def trained(self) -> int:
        """How many values train for it: one for each that is packed, none for indices, lines, or what is fixed."""
        if self.bits is not None:
            return self.bits // self.width
        moves = self.rule not in (Rule.FIXED, Rule.REQUANTISE) and self.dtype in FLOATS
        return self.size_bytes // FLOATS[self.dtype] if moves else 0


Schema: TypeAlias = dict[str, Field]


class Factors(NamedTuple):
    """The keys of the two factors of a product: B (d_out, r) and A (r, d_in), with an open r."""

    B: str
    A: str


def factors(schema: Schema) -> dict[str, Factors]:
    """Return the factors of each product by group; raises ValueError for a group that is not two that multiply."""
    keys: dict[str, list[str]] = {}
    for key, field in schema.items():
        if field.rule is Rule.PRODUCT:
            keys.setdefault(field.group, []).append(key)
    pairs: dict[str, Factors] = {}
    for group, members in keys.items():
        lefts = [key for key in members if _is_open(schema[key], 1)]
        rights = [key for key in members if _is_open(schema[key], 0)]
        if len(members) != 2 or len(lefts) != 1 or len(rights) != 1:
            raise ValueError(f"group {group!r}: a product has factors (d_out, None) and (None, d_in), not {members}")
        pairs[group] = Factors(lefts[0], rights[0])
    return pairs


class Entries(NamedTuple):
    """The keys of a sparse matrix: where its entries are, integers (k,) that rise, and their values (k,)."""

    at: str
    values: str


def entries(schema: Schema) -> dict[str, Entries]:
    """Return the entries of each union by group; raises ValueError for a group that is not an index and its values."""
    keys: dict[str, list[str]] = {}
    for key, field in schema.items():
        if field.rule is Rule.UNION:
            keys.setdefault(field.group, []).append(key)
    pairs: dict[str, Entries] = {}
    for group, members in keys.items():
        indices = [key for key in members if schema[key].dtype in INTEGERS]
        values = [key for key in members if schema[key].dtype in FLOATS]
        shapes = {schema[key].shape for key in members}
        if len(indices) != 1 or len(values) != 1 or len(shapes) != 1 or len(shapes.pop()) != 1:
            raise ValueError(f"group {group!r}: a union has integers (k,) and values (k,), not {sorted(members)}")
        pairs[group] = Entries(indices[0], values[0])
    return pairs


def votes(schema: Schema) -> dict[str, int]:
    """Return the keys of the packed bits that are voted on, and how many bits each has."""
    return {key: field.bits for key, field in schema.items() if field.rule is Rule.VOTE and field.bits is not None}


class Codes(NamedTuple):
    """The keys of values in few bits: their packed codes, and what takes these to values, (mean, deviation)."""

    codes: str
    line: str


def codes(schema: Schema) -> dict[str, Codes]:
    """Return the codes of each group that has some; raises ValueError for a group that is not codes and a line."""
    keys: dict[str, list[str]] = {}
    for key, field in schema.items():
        if field.rule is Rule.REQUANTISE:
            keys.setdefault(field.group, []).append(key)
    pairs: dict[str, Codes] = {}
    for group, members in keys.items():
        packed = [key for key in members if schema[key].bits is not None]
        lines = [key for key in members if (schema[key].dtype, schema[key].shape) == ("F32", (2,))]
        if len(members) != 2 or len(packed) != 1 or len(lines) != 1:
            raise ValueError(f"group {group!r}: values in few bits have codes and a line F32 (2,), not {members}")
        pairs[group] = Codes(packed[0], lines[0])
    return pairs


def is_judged_by_value(schema: Schema) -> bool:
    """Tell whether how far an update went is not the distance of its tensors: bits, codes or indices have none."""
    return any(field.rule in (Rule.UNION, Rule.VOTE, Rule.REQUANTISE) for field in schema.values())


def _is_open(field: Field, dimension: int) -> bool:
    """Tell whether a field is a matrix of which this dimension alone may differ among sites."""
    return len(field.shape) == 2 and [at for at in (0, 1) if field.shape[at] is None] == [dimension]


def groups(schema: Schema) -> dict[str, list[str]]:
    """Return the sorted keys of each group; a tensor without one is a group by its own name."""
    keys: dict[str, list[str]] = {}
    for key, field in sorted(schema.items()):
        keys.setdefault(field.group or key, []).append(key)
    return keys


def only(schema: Schema, names: Collection[str]) -> Schema:
    """Return the fields of some groups; raises ValueError for a group that is none of the schema's."""
    known = groups(schema)
    if strange := sorted({*names} - known.keys()):
        raise ValueError(f"the schema has no group {strange[0]!r}")
    kept = {key for name in names for key in known[name]}
    return {key: field for key, field in schema.items() if key in kept}


def rules(schema: Schema) -> frozenset[Rule]:
    """Return what a strategy must fold to take updates of this schema."""
    return frozenset(field.rule for field in schema.values())


def is_open(schema: Schema) -> bool:
    """Tell whether sites of different tiers have tensors of different shapes."""
    return any(None in field.shape for field in schema.values())


def settle(schema: Schema, shapes: Mapping[str, Iterable[int]]) -> Schema:
    """Return the schema of one tier, with the open sizes of these shapes; raises ValueError where one does not fit."""
    if schema.keys() != shapes.keys():
        raise ValueError(f"the schema and the shapes are of other tensors: {sorted(schema.keys() ^ shapes.keys())[:3]}")
    return {key: replace(field, shape=_settled(key, field.shape, tuple(shapes[key]))) for key, field in schema.items()}


def _settled(key: str, shape: tuple[int | None, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != len(sizes) or any(size not in (None, own) for size, own in zip(shape, sizes, strict=True)):
        raise ValueError(f"tensor {key} of shape {list(sizes)} does not fit the schema's {list(shape)}")
    return sizes


def size_bytes(schema: Schema) -> int:
    """Bytes that the tensors of a settled schema take, without the header of a file."""
    return sum(field.size_bytes for field in schema.values())
