"""O-LoRA's constraint: a task changes weights in directions of their inputs that earlier tasks have left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from offsite.emulator.retention.base import Anchored, State, check_strength, moving, named
from offsite.kernels.schema import Field, Rule, Schema, TensorMap, Tensors, factors

if TYPE_CHECKING:
    from torch import Tensor

BASIS = "basis"  # the name of the state: by group, orthonormal rows (k, d_in)
NEGLIGIBLE = 1e-5  # of a matrix's largest singular value


@dataclass(frozen=True)
class Orthogonal(Anchored):
    """Add strength * sum |(B A - B0 A0) Q^T|^2, Frobenius, over the maps that train (Wang et al., arXiv 2310.14152).

    B0 A0 is the product that the run goes on from, and Q (k, d_in) an orthonormal basis of the row spaces of the
    products of earlier tasks. O-LoRA gives each task factors of its own and penalises A_old A^T, which is zero where
    this is; here one product goes on, and what is held orthogonal is its change. So it does not matter which factors a
    product is written as, and averages of products may choose them anew in each round. A task adds at most as many rows
    to Q as its adapter has, and what trains needs a rank in which earlier tasks leave room. A scale that multiplies all
    products is left out.
    """

    strength: float = 0.5

    name: ClassVar[str] = "orthogonal"
    paper: ClassVar[str] = "arXiv 2310.14152"
    needs: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT})
    valued: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range."""
        check_strength(self.strength)

    def remember(self, adapter: Tensors, schema: Schema, state: State) -> dict[str, Tensors]:
        """Add the directions that the products of a version read to those of the tasks before it."""
        known = state.get(BASIS, {})
        basis = {
            group: _widened(known.get(group), adapter[pair.B], adapter[pair.A])
            for group, pair in factors(schema).items()
        }
        return {**state, BASIS: basis}

    def anchor(self, broadcast: Tensors, schema: Schema, state: State) -> Tensors:
        """Return the products before, by their factors, and the basis."""
        keys = [key for key in moving(schema) if schema[key].rule is Rule.PRODUCT]
        return named("before", {key: broadcast[key] for key in keys}) | named(BASIS, state[BASIS])

    def expects(self, schema: Schema) -> Schema:
        """Expect the factors, and a basis of any size for each product."""
        groups: dict[str, int] = {}
        expected: Schema = {}
        for key, field in schema.items():
            if field.rule is Rule.PRODUCT:
                expected[f"before.{key}"] = Field("F32", field.shape, Rule.FIXED)
                if key.endswith("A"):
                    groups[field.group] = field.shape[1] or 0
        return expected | {f"{BASIS}.{group}": Field("F32", (None, d), Rule.FIXED) for group, d in groups.items()}

    def penalty(self, values: TensorMap, anchor: TensorMap) -> Tensor:
        """See `base.Penalising`; no product is made: B (A Q^T) is (d_out, k)."""
        import torch

        terms: list[Tensor] = []
        for name, Q in anchor.items():
            part, _, group = name.partition(".")
            a, b = f"{group}.A", f"{group}.B"
            if part != BASIS or a not in values or b not in values:
                continue
            ahead = values[b] @ (values[a] @ Q.T)
            before = anchor[f"before.{b}"] @ (anchor[f"before.{a}"] @ Q.T)
            terms.append((ahead - before).square().sum())
        return self.strength * torch.stack(terms).sum()


def _widened(basis: Tensor | None, B: Tensor, A: Tensor) -> Tensor:
    """Return an orthonormal basis (k, d_in) of the rows of another one and of B A."""
    import torch

    rows = torch.linalg.qr(B.double()).R @ A.double()  # those of B A, but fewer
    least = NEGLIGIBLE * float(torch.linalg.matrix_norm(rows, 2)) if rows.numel() else 0.0
    known = rows.new_zeros(0, rows.shape[1]) if basis is None else basis.double()
    for _ in range(2):  # once more, for what rounding has left of the first time
        rows = rows - rows @ known.T @ known
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    return torch.cat([known, directions[sizes > least]]).float()
