"""SoKA (Chong and Qu, arXiv 2506.15251): a change of W that is a sum of Kronecker products, which start from W's own.

    W' = W + sum_k U_k (x) V_k - sum_k U0_k (x) V0_k        U_k (m, n), V_k (p, q)

W (m p, n q) is seen as m x n blocks of p x q. With one row for each block, of its entries, it is a matrix of m n rows
and p q columns, and a sum of Kronecker products is a product of two factors (Van Loan and Pitsianis, 1993):

    blocked(sum_k U_k (x) V_k) = B A        column k of B (m n, r) is vec(U_k), row k of A (r, p q) is vec(V_k)

So the largest terms are those of a singular value decomposition, and sites' changes are averaged as LoRA's are: the
product B A is linear in W', and the strategy that averages products exactly needs to know nothing of blocks.
U and V start as the largest terms of W, U0 and V0 stay those, and the base keeps every bit (as in `initial`).
The paper chooses how many terms there are by their singular values, map by map. Here it is a setting: sites and owner
must know the shapes of what they send before anyone has looked at the weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import find, shape
from offsite.emulator.formats.packed import dense
from offsite.emulator.methods.base import Adapter, Disclosure, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.initial import principal
from offsite.emulator.methods.recovery import refuse
from offsite.emulator.methods.targets import Modules, Outputs
from offsite.emulator.outline import NARROWED
from offsite.kernels.schema import Field, Rule, Schema


class Grid(NamedTuple):
    """How a matrix (m p, n q) is cut: m rows and n columns of blocks, p x q entries each."""

    m: int
    n: int
    p: int
    q: int

    @classmethod
    def of(cls, d_out: int, d_in: int) -> "Grid":
        """Return the one with about as many blocks as a block has entries, for which a term is smallest."""
        m, n = (max(k for k in range(1, isqrt(size) + 1) if size % k == 0) for size in (d_out, d_in))
        return cls(m, n, d_out // m, d_in // n)

    @property
    def cells(self) -> int:
        """How many blocks there are."""
        return self.m * self.n

    @property
    def entries(self) -> int:
        """How many entries a block has."""
        return self.p * self.q

    def blocked(self, W: Tensor) -> Tensor:
        """Return a matrix (m p, n q) as (m n, p q): one row for each block."""
        return W.reshape(self.m, self.p, self.n, self.q).transpose(1, 2).reshape(self.cells, self.entries)

    def joined(self, blocks: Tensor) -> Tensor:
        """Return the matrix (m p, n q) of rows (m n, p q)."""
        return blocks.reshape(self.m, self.n, self.p, self.q).transpose(1, 2).reshape(self.m * self.p, -1)

    def product(self, B: Tensor, A: Tensor, x: Tensor) -> Tensor:
        """Return (sum_k U_k (x) V_k) x (..., d_out) for x (..., d_in), as the sum of U X V' with X, x as n x q."""
        U, V = B.T.reshape(-1, self.m, self.n), A.reshape(-1, self.p, self.q)
        inner = torch.einsum("...nq,kpq->...nkp", x.reshape(*x.shape[:-1], self.n, self.q), V)
        return torch.einsum("...nkp,kmn->...mp", inner, U).flatten(-2)


class Kronecker(Beside):
    """A linear map with a sum of Kronecker products along it, and off it those that the sum started from."""

    def __init__(self, linear: nn.Module, parts: Parts) -> None:
        """Take the map, A and B, and A0 and B0, which do not train."""
        super().__init__(linear, parts, fixed=Soka.fixed)
        self.grid = Grid.of(*shape(linear))

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        B, A, B0, A0 = self.get_parameter("B"), self.get_parameter("A"), self.get_buffer("B0"), self.get_buffer("A0")
        x = x.to(A.dtype)
        change = self.grid.product(B, A, x) - self.grid.product(B0, A0, x)  # nothing at a start, bit for bit
        return y + change.to(y.dtype)


@dataclass(frozen=True)
class Soka(BesideMaps):
    """Train "28.mlp.down_proj.B" (m n, r) and ".A" (r, p q), of r terms; ".B0" and ".A0" are what they start from.

    m and n are the largest divisors of d_out and d_in that are no larger than the root.
    """

    terms: int = 8
    modules: Modules | Outputs = "all-linear"

    name: ClassVar[str] = "soka"
    rate: ClassVar[float] = 3e-3
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT, Rule.FIXED})
    paper: ClassVar[str] = "arXiv 2506.15251"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "terms * (cells + d_out * d_in // cells)")
    mergeable: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    seeded: ClassVar[bool] = False
    disclosure: ClassVar[Disclosure] = Disclosure.PARTS
    fixed: ClassVar[frozenset[str]] = frozenset({"A0", "B0"})

    def __post_init__(self) -> None:
        """Check the range."""
        if self.terms < 1:
            raise ValueError(f"terms must be at least 1, got {self.terms}")

    @property
    def axes(self) -> Axes:
        """Two pairs of factors; of an average the one that trains has more terms than the other."""
        return {
            "A": ("terms", "entries"),
            "B": ("cells", "terms"),
            "A0": ("first", "entries"),
            "B0": ("cells", "first"),
        }

    def schema(self, start: Adapter) -> Schema:
        """Return a product a map, whose number of terms is open, and the fixed ones that are taken off."""
        fields: Schema = {}
        for place, parts in grouped(start, self.axes).items():
            group = f"{place.layer}.{place.path}"
            fields[place.key("A")] = Field("F32", (None, parts["A"].shape[1]), Rule.PRODUCT, group)
            fields[place.key("B")] = Field("F32", (parts["B"].shape[0], None), Rule.PRODUCT, group)
            fields |= {
                place.key(part): Field("F32", tuple(parts[part].shape), Rule.FIXED) for part in sorted(self.fixed)
            }
        return fields

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return the paths of the maps at each place; raises ValueError also where a map has too few terms."""
        maps = super().maps(model, places)
        for at, paths in maps.items():
            for path in paths:
                d_out, d_in = shape(find(model).layers[at].get_submodule(path))
                grid = Grid.of(d_out, d_in)
                if self.terms > (most := min(grid.cells, grid.entries)):
                    raise ValueError(
                        f"{places[at]}.{path} {(d_out, d_in)}, as {grid.m} x {grid.n} blocks of {grid.p} x {grid.q}, "
                        f"is a sum of {most} terms, fewer than {self.terms}; lower terms, or name other maps as modules"
                    )
        return maps

    def initial(self, place: Place, linear: nn.Module, seed: int) -> Parts:
        """Return the largest terms of the weight that the model has, twice."""
        A, B = principal(Grid.of(*shape(linear)).blocked(dense(linear)), self.terms, 1.0)
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def beside(self, linear: nn.Module, parts: Parts) -> Kronecker:
        """Return a map with its products."""
        return Kronecker(linear, parts)

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight, and the bias as it is."""
        change = parts["B"] @ parts["A"] - parts["B0"] @ parts["A0"]
        return W + Grid.of(*W.shape).joined(change), b

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map of a model, with its tensors; raises ValueError if one does not fit, or is of other blocks."""
        for place, linear, parts in super().fitting(model, maps):
            grid, has = Grid.of(*shape(linear)), (len(parts["B"]), parts["A"].shape[1])
            if has != (grid.cells, grid.entries):
                raise ValueError(
                    f"{place.layer}.{place.path} {shape(linear)} is cut into {grid.cells} blocks of {grid.entries} "
                    f"entries, the adapter's B and A are of {has[0]} and {has[1]}"
                )
            yield place, linear, parts

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(grouped(adapter, self.axes), recovery, "which is cut into other blocks")
        return adapter
