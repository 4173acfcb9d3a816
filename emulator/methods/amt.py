"""AMT, attention mask tuning (Zheng et al., arXiv 2307.15049): some weights of a map become zero, and none changes.

    y = (M . W) x + b          M = 1 where a score is above the threshold, else 0

Scores train, with the gradient of M passed straight on to them; M leaves a site, a bit for a weight, and sites vote on
each bit. A round's scores start at 0.01 where the last M has a one and as far below the threshold, 0.005, where it has
a zero. A merged model has plain zeros in W, and every other weight bit for bit.

Not here is the paper's regulariser, which makes R-AMT of it: gradient dropout by the sign of a second gradient, that of
the divergence from the untouched model, for which each step would run both models backwards. Nor is its penalty on the
scores' norm, which a round forgets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from offsite.emulator.anatomy.structure import is_transposed, shape
from offsite.emulator.methods.base import Adapter, Formula, Kind, Place
from offsite.emulator.methods.beside import Axes, Beside, BesideMaps, Parts, grouped
from offsite.emulator.methods.maps import wrapped
from offsite.emulator.methods.targets import Attention, Modules
from offsite.kernels.bits import pack, unpack
from offsite.kernels.schema import Field, Rule, Schema

ON, THRESHOLD = 0.01, 0.005
OFF = 2 * THRESHOLD - ON


class Masked(Beside):
    """A linear map with a score for each of its weights, and zeros for those whose score is low."""

    linear: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., d_out) for x (..., d_in)."""
        W, bias = self.linear.weight, self.linear.bias
        W = W.T if is_transposed(self.linear) else W
        left: Tensor = _Left.apply(W, self.get_parameter("score"))  # type: ignore[no-untyped-call]
        return functional.linear(x, left.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @property
    def mask(self) -> Tensor:
        """Whether each weight stays, (d_out, d_in)."""
        return self.get_parameter("score").detach() > THRESHOLD


class _Left(torch.autograd.Function):
    """(W, scores) -> what is left of W. Of M . W a score's gradient is W's entry times the gradient there."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return torch.where(score > THRESHOLD, W, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (W,) = ctx.saved_tensors
        return None, gradient.float() * W.float()


@dataclass(frozen=True)
class Amt(BesideMaps):
    """Train which weights of some maps are zero, by as many fp32 scores as a map has weights.

    An adapter has "28.self_attn.q_proj.mask" (ceil(d_out * d_in / 8),) uint8, row by row, and ".size" (2,) int32, the
    map's (d_out, d_in), without which bytes do not say how many bits count.
    """

    modules: Modules | Attention = "attention"

    name: ClassVar[str] = "amt"
    rate: ClassVar[float] = 3e-4
    paper: ClassVar[str] = "arXiv 2307.15049"
    kind: ClassVar[Kind] = Kind.SELECTIVE
    formula: ClassVar[Formula] = Formula("map", "d_out * d_in")
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.VOTE, Rule.FIXED})
    mergeable: ClassVar[bool] = True
    seeded: ClassVar[bool] = False

    @property
    def axes(self) -> Axes:
        """Bytes, and two sizes."""
        return {"mask": ("bytes",), "size": ("sizes",)}

    def schema(self, start: Adapter) -> Schema:
        """Return bits that are voted on, and sizes that all sites have in common."""
        fields: Schema = {}
        for place, parts in grouped(start, self.axes).items():
            group, (d_out, d_in) = f"{place.layer}.{place.path}", parts["size"].tolist()
            fields[place.key("mask")] = Field("U8", tuple(parts["mask"].shape), Rule.VOTE, group, bits=d_out * d_in)
            fields[place.key("size")] = Field("I32", (2,), Rule.FIXED, group, below=max(d_out, d_in) + 1)
        return fields

    def initial(self, place: Place, linear: nn.Module, seed: int) -> Parts:
        """Return a mask that keeps every weight."""
        return _parts(torch.ones(shape(linear), dtype=torch.bool))

    def beside(self, linear: nn.Module, parts: Parts) -> Masked:
        """Return a map with scores."""
        kept = _mask(parts).to(parts["mask"].device)
        return Masked(linear, {"score": torch.where(kept, ON, OFF)})

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live scores of an attached model by the keys of their masks."""
        modules = wrapped(model, places, Masked)
        return {place.key("mask"): one.get_parameter("score") for place, one in modules.items()}

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the masks off an attached model."""
        modules = wrapped(model, places, Masked)
        return {place.key(name): part for place, one in modules.items() for name, part in _parts(one.mask).items()}

    def fitting(self, model: nn.Module, maps: Mapping[Place, Parts]) -> Iterator[tuple[Place, nn.Module, Parts]]:
        """Yield each map of a model with its mask; raises ValueError if one is that of a map of another size."""
        for place, linear, parts in super().fitting(model, maps):
            if (size := tuple(parts["size"].tolist())) != shape(linear):
                raise ValueError(
                    f"{place.key('size')!r}: {size} is not that of the map, (d_out, d_in) = {shape(linear)}"
                )
            yield place, linear, parts

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Keep the weights that were left out where the emulator's maps were narrowed; raises ValueError if none fits.

        `recovery` is as `methods.recovery.widen` has it.
        """
        wide: Adapter = {}
        for place, parts in grouped(adapter, self.axes).items():
            name, mask = f"{place.layer}.{place.path}", _mask(parts)
            if f"{name}.shape" in recovery:
                d_out, d_in = recovery[f"{name}.shape"].tolist()
                rows = recovery.get(f"{name}.rows", torch.arange(d_out))
                columns = recovery.get(f"{name}.columns", torch.arange(d_in))
                if mask.shape != (len(rows), len(columns)):
                    raise ValueError(
                        f"{name}: a mask of {tuple(mask.shape)} does not fit a map that was narrowed to "
                        f"(d_out, d_in) = {(len(rows), len(columns))}"
                    )
                narrow, mask = mask, torch.ones(d_out, d_in, dtype=torch.bool)
                mask[rows[:, None], columns] = narrow
            wide |= {place.key(part): tensor for part, tensor in _parts(mask).items()}
        return wide

    def merged(self, W: Tensor, b: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """Return the weight with zeros, and the bias as it is."""
        return torch.where(_mask(parts).to(W.device), W, 0), b


def _parts(mask: Tensor) -> Parts:
    """Return what an adapter has of a mask (d_out, d_in)."""
    return {"mask": pack(mask.flatten()), "size": torch.tensor(mask.shape, dtype=torch.int32)}


def _mask(parts: Parts) -> Tensor:
    """Return the mask (d_out, d_in) on the CPU; raises ValueError unless there are as many bytes as it takes."""
    d_out, d_in = parts["size"].tolist()
    return unpack(parts["mask"], d_out * d_in).view(d_out, d_in).bool()
