"""DoRA (Liu et al., arXiv 2402.09353): LoRA changes the direction of each row of W, and a value of its own its length.

    W' = diag(m) (W + scale * B A)    with m = (1 + magnitude) * |W| / |W + scale * B A|, row by row

Norms are Frobenius norms of rows, and as in the paper (4.3) no gradient goes through them. The paper trains the length
itself, (1 + magnitude) * |W|, which is of one base. What it grows by is zero at a start whatever the weights, and means
the same on an emulator in few bits as on the base. A row of which columns are gone turns further than the whole one by
the same product, so maps are not narrowed.
Products are averaged as LoRA's and magnitudes by their mean. W' is not linear in them, so that neither makes the mean
of the changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.formats.packed import dense
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Adapter, Disclosure, Factors, Formula, Kind
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.recovery import refuse
from offsite.emulator.methods.targets import Modules
from offsite.emulator.outline import NARROWED
from offsite.kernels.schema import Field, Rule, Schema


class Decomposed(Beside):
    """A linear map whose rows have a direction and a length that train."""

    linear: Any
    norms: Tensor

    def __init__(self, linear: nn.Module, parts: Parts, *, scale: float) -> None:
        """Take the map, the factors and magnitudes, and what multiplies the product."""
        super().__init__(linear, parts)
        self.scale = scale
        self.register_buffer("norms", dense(linear).norm(dim=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        y: Tensor = self.linear(x)
        A, B, magnitude = (self.get_parameter(part) for part in ("A", "B", "magnitude"))
        m = (1 + magnitude) * self._shrinking(A, B, x.dtype)
        change = self.scale * functional.linear(functional.linear(x.to(A.dtype), A), B)
        straight = y if self.linear.bias is None else y - self.linear.bias.to(y.dtype)
        return y + ((m - 1) * straight + m * change).to(y.dtype)  # nothing is left of it at a start, bit for bit

    @torch.no_grad()
    def _shrinking(self, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        """Return |W| / |W + scale * B A| (d_out,) by |w + b|^2 = |w|^2 + 2 w b + |b|^2: W A' is the map's own output.

        W is not read, which an engine may have scattered over processes, and no matrix of its size is made.
        """
        straight = self.linear(A.to(dtype)).to(A.dtype)
        if self.linear.bias is not None:
            straight = straight - self.linear.bias.to(A.dtype)
        cross, own = (straight.T * B).sum(1), (B @ (A @ A.T) * B).sum(1)
        square = self.norms.square() + 2 * self.scale * cross + self.scale**2 * own
        return _ratio(self.norms, square.clamp_min(0).sqrt())


@dataclass(frozen=True)
class Dora(BesideMaps):
    """Train "28.mlp.down_proj.A" (r, d_in), ".B" (d_out, r) and ".magnitude" (d_out,), by how much rows grow."""

    rank: int = 8
    alpha: float = 16.0
    modules: Modules = "all-linear"
    scaling: Literal["alpha / rank", "alpha / sqrt(rank)"] = "alpha / rank"

    name: ClassVar[str] = "dora"
    rate: ClassVar[float] = 3e-3
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.PRODUCT, Rule.MEAN})
    paper: ClassVar[str] = "arXiv 2402.09353"
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    formula: ClassVar[Formula] = Formula("map", "rank * (d_in + d_out) + d_out")
    mergeable: ClassVar[bool] = True
    disclosure: ClassVar[Disclosure] = Disclosure.FIGURES  # an export has the lengths of rows, as the paper trains them

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")

    @property
    def scale(self) -> float:
        """What multiplies the product, also in an average of a higher rank."""
        return self.alpha / (self.rank if self.scaling == "alpha / rank" else self.rank**0.5)

    @property
    def axes(self) -> Axes:
        """Two factors, and one value for each row."""
        return {"A": ("rank", "columns"), "B": ("rows", "rank"), "magnitude": ("rows",)}

    def schema(self, start: Adapter) -> Schema:
        """Return a product a map, whose rank is open, and magnitudes that are averaged each by itself."""
        fields: Schema = {}
        for place, parts in grouped(start, self.axes).items():
            group = place.key("BA")
            fields[place.key("A")] = Field("F32", (None, parts["A"].shape[1]), Rule.PRODUCT, group)
            fields[place.key("B")] = Field("F32", (parts["B"].shape[0], None), Rule.PRODUCT, group)
            fields[place.key("magnitude")] = Field("F32", tuple(parts["magnitude"].shape), Rule.MEAN)
        return fields

    def maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[int, list[str]]:
        """Return LoRA's maps, those that peft can tell from experts; raises ValueError as `BesideMaps.maps` does."""
        return peft_format.maps(model, places, self.modules, method="DoRA")

    def draw(self, part: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
        """Return uniform values for A, and zeros."""
        bound = size[-1] ** -0.5
        return torch.empty(size).uniform_(-bound, bound, generator=random) if part == "A" else torch.zeros(size)

    def beside(self, linear: nn.Module, parts: Parts) -> Decomposed:
        """Return a map whose rows turn and grow."""
        return Decomposed(linear, parts, scale=self.scale)

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed."""
        refuse(grouped(adapter, self.axes), recovery, "whose rows the same product turns less")
        return adapter

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight, and the bias as it is."""
        turned = W + self.scale * (parts["B"] @ parts["A"])
        m = (1 + parts["magnitude"]) * _ratio(W.norm(dim=1), turned.norm(dim=1))
        return m[:, None] * turned, b

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained` on the base.

        Stock peft has the rows' lengths, of this base, where ours has what they grow by.
        """
        pairs, lengths = {}, {}
        for place, linear, parts in self.fitting(base, grouped(adapter, self.axes)):
            pairs[place] = Factors(parts["A"], parts["B"])
            lengths[place] = (1 + parts["magnitude"]) * dense(linear).norm(dim=1).to("cpu", torch.float32)
        scales = dict.fromkeys(pairs, self.scale)
        peft_format.write(directory, pairs, scales, base=base, base_name=base_name, lengths=lengths)


def _ratio(norms: Tensor, others: Tensor) -> Tensor:
    """Return the quotient, or 1 for a row that is zero and stays so."""
    return torch.where(others > 0, norms / others.where(others > 0, 1), 1)
