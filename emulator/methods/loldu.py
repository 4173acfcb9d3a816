"""LoLDU (Shi et al., arXiv 2410.13618): of an LDU factorisation of each map, the diagonal trains and nothing else.

    W[rows] = L D U        W' = W + L diag(z) U        z: by how much the first r entries of D have grown

by Gaussian elimination of the first r columns, each with its largest entry as pivot. L (d_out, r) is 1 in the rows that
were pivots, one column each, and 0 above; U (r, d_in) is 1 on the diagonal and 0 below. L is kept in the order of W's
rows, so that no permutation is left to apply. The paper trains D itself, of which z is the change, zero at a start.
W' is linear in z: the mean of adapters is the mean of the weights, exactly.

Only z is sent. L and U everybody makes of the weights, rounded to bf16 first and in fp64, so that two machines differ
in the last digits alone. But where two entries of a column are equal to those digits, the machines may take another row
as pivot, and a later z would mean another matrix. So an adapter says by a check sum which rows were taken, in which
order, and is refused where the rows are others. A matrix in few bits has others than the base's, and so has a narrowed
one: neither trains.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.anatomy.structure import shape
from offsite.emulator.formats.packed import PackedLinear, dense
from offsite.emulator.methods.base import Adapter, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.initial import NOTHING, rounded
from offsite.emulator.methods.recovery import refuse
from offsite.emulator.methods.targets import Modules, Outputs
from offsite.emulator.outline import NARROWED, PACKED
from offsite.kernels.schema import Field, Rule, Schema

SUMS = 1 << 32  # how many values a CRC-32 has


class Ldu(NamedTuple):
    """The factors of the first r pivots, in fp64: W[:, :r] = L diag(D) U[:, :r], and W[rows] = L[rows] diag(D) U."""

    L: Tensor  # (d_out, r)
    D: Tensor  # (r,)
    U: Tensor  # (r, d_in)
    rows: Tensor  # int64 (r,), those of W that were pivots

    @property
    def order(self) -> Tensor:
        """A check sum of the rows, int64 (1,)."""
        return torch.tensor([zlib.crc32(",".join(map(str, self.rows.tolist())).encode())])


def factorised(W: Tensor, rank: int) -> Ldu:
    """Return the factors of W (d_out, d_in), which is rounded to bf16 first; rank is at most min(d_out, d_in).

    Columns beyond those have no part in the choice of pivots, and the cost is of the order of rank^2 (d_out + d_in).
    Raises ValueError where a column is a sum of those before it, which leaves no pivot.
    """
    W = rounded(W)
    packed, pivots, _ = torch.linalg.lu_factor_ex(W[:, :rank])
    order = list(range(len(W)))
    for at, other in enumerate(pivots.tolist()):
        order[at], order[other - 1] = order[other - 1], order[at]  # LAPACK counts from 1
    rows, D = torch.tensor(order), packed.diagonal()
    if none := (D.abs() <= NOTHING * D.abs().max()).nonzero().flatten().tolist():
        raise ValueError(
            f"column {none[0]} of the matrix {tuple(W.shape)} is a sum of those before it, so that its LDU factors "
            f"have rank {none[0]} at most, not {rank}; lower rank, or name other maps as modules"
        )
    L = packed.tril(-1)
    L.diagonal().fill_(1)
    U = torch.linalg.solve_triangular(L[:rank], W[rows[:rank]], upper=False, unitriangular=True) / D[:, None]
    U = U.triu()
    U.diagonal().fill_(1)  # which the division leaves at nearly 1
    return Ldu(torch.empty_like(L).index_copy(0, rows, L), D.clone(), U, rows[:rank])


class Diagonal(Beside):
    """A linear map with the factors between which a diagonal trains."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        z, L, U = self.get_parameter("diagonal"), self.get_buffer("L"), self.get_buffer("U")
        return y + functional.linear(z * functional.linear(x.to(z.dtype), U), L).to(y.dtype)


@dataclass(frozen=True)
class Loldu(BesideMaps):
    """Train "28.mlp.down_proj.diagonal" (r,); ".order" (1,) is a check sum of the rows that were pivots.

    Beside a map, L and U are r (d_out + d_in) values in fp32, as many as LoRA of that rank has, which do not train.
    """

    rank: int = 256  # the most; a map of fewer rows or columns has its whole diagonal
    modules: Modules | Outputs = "all-linear"

    name: ClassVar[str] = "loldu"
    rate: ClassVar[float] = 1e-3
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED, PACKED})
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    paper: ClassVar[str] = "arXiv 2410.13618"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "min(rank, d_out, d_in)")
    mergeable: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = False
    fixed: ClassVar[frozenset[str]] = frozenset({"order"})

    def __post_init__(self) -> None:
        """Check the range."""
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    @property
    def axes(self) -> Axes:
        """One value for each pivot, and one number."""
        return {"diagonal": ("rank",), "order": ("one",)}

    def schema(self, start: Adapter) -> Schema:
        """Return diagonals that are averaged, and check sums that all sites have in common."""
        fields: Schema = {}
        for place, parts in grouped(start, self.axes).items():
            group = f"{place.layer}.{place.path}"
            fields[place.key("diagonal")] = Field("F32", tuple(parts["diagonal"].shape), Rule.MEAN, group)
            fields[place.key("order")] = Field("I64", (1,), Rule.FIXED, group, below=SUMS)
        return fields

    def initial(self, place: Place, linear: nn.Module, seed: int) -> Parts:
        """Return zeros and the check sum; raises ValueError where a map has no factors, or is stored in few bits."""
        rank = min(self.rank, *shape(linear))
        return {"diagonal": torch.zeros(rank), "order": _of(place, linear, rank).order}

    def beside(self, linear: nn.Module, parts: Parts) -> Diagonal:
        """Return a map with its diagonal, and the factors that `fitting` made."""
        return Diagonal(linear, parts, fixed=parts.keys() - {"diagonal"})

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight, and the bias as it is."""
        return W + parts["L"] @ (parts["diagonal"][:, None] * parts["U"]), b

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map of a model with its tensors, L and U; raises ValueError if they are not the adapter's."""
        for place, linear, parts in super().fitting(model, maps):
            rank, most = len(parts["diagonal"]), min(shape(linear))
            if rank > most:
                raise ValueError(f"{place.key('diagonal')!r} ({rank},) is longer than the map's diagonal, ({most},)")
            L, _, U, _ = factors = _of(place, linear, rank)
            if not torch.equal(factors.order, parts["order"].cpu()):
                raise ValueError(
                    f"{place.layer}.{place.path}: other rows are pivots here than where the adapter was started. It is "
                    "of another base's weights, or two rows are so much alike that this machine's LAPACK chose "
                    "otherwise: take the base that it was trained on, or a machine like the one it was started on"
                )
            yield place, linear, parts | {"L": L.float(), "U": U.float()}

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(grouped(adapter, self.axes), recovery, "of which other rows are pivots")
        return adapter


def _of(place: Place, linear: nn.Module, rank: int) -> Ldu:
    name = f"{place.layer}.{place.path}"
    if isinstance(linear, PackedLinear):
        raise ValueError(f"{name} is stored in few bits, and other rows are its pivots; choose another method")
    try:
        return factorised(dense(linear), rank)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
