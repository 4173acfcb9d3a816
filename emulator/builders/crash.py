"""CRaSh (Zhang et al., EMNLP 2023, arXiv 2310.15477): clustering, removing and sharing of layers, without training.

Layers are compared by linear CKA of their pooled outputs, always in fp32, and the chain of layers is cut at its weakest
links; each segment keeps one layer. Where other cuts are as good (see `reductions`), the one by which the calibration
text is predicted best is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.activations import read
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import longest
from offsite.emulator.builders.base import Stage, droppable, kept_of
from offsite.emulator.builders.reductions import Kept, Ways, cluster, drop
from offsite.emulator.modality import Batch
from offsite.emulator.outline import REDUCTION, Grounds, Outline
from offsite.emulator.placements import Placement
from offsite.emulator.precision import in_fp32

JUDGES = 8  # examples, the longest, by which choices are judged; where one is wrong it is so by much
EQUAL = 1e-3  # nats a token: what is nearer is equally good, and the first is taken
STRAIN = 0.02  # nats a token that a way must be better by if its strain is half of the margin; at all of it, no more do


@dataclass(frozen=True)
class Crash:
    """Keeps `keep` distinct layers in all: those the placement fixes, and of the rest one per segment of similar ones.

    Reduction "drop" is the paper's other one: of the two neighbours that are most alike the right one goes, again and
    again. Sharing fills the gaps with the nearest kept layer: "off", "on", or "auto" if the calibration text is then
    better predicted.
    """

    keep: int | None = None  # distinct layers in all; None: four fifths
    reduction: Literal["cluster", "drop"] = "cluster"
    sharing: Literal["off", "auto", "on"] = "off"

    name: ClassVar[str] = "crash"
    stage: ClassVar[Stage] = "depth"
    provides: ClassVar[frozenset[str]] = frozenset({REDUCTION})
    needs: ClassVar[frozenset[str]] = frozenset()
    looks_at_text: ClassVar[bool] = True
    trains_on_text: ClassVar[bool] = False

    def kept(self, depth: int) -> int:
        """Return `keep`, or four fifths of the depth."""
        return kept_of(depth, self.keep)

    def outline(self, model: nn.Module, batches: Sequence[Batch], placement: Placement) -> Outline:
        """Decide by how `model` represents the calibration text; raises ValueError if the settings do not fit."""
        depth = len(layers(model))
        keep, fixed = self.kept(depth), placement.fixed(depth)
        inner = droppable(depth, keep=keep, fixed=fixed)
        reduce = cluster if self.reduction == "cluster" else drop
        with in_fp32(model):
            ways = reduce(pooled(model, batches)[inner], keep - len(fixed))
            text = longest(batches, JUDGES)

            def nats(outline: Outline) -> float:
                return modality.score(restack(model, outline.layers, outline.shared), text).mean

            def removed(way: Kept) -> Outline:
                kept = sorted({*fixed, *(inner[at] for at in way)})
                return Outline(tuple(kept), placement.choose(kept, depth))

            way, lead = judged(ways, lambda way: nats(removed(way)))
            links = {inner[at]: link for at, link in enumerate(ways.links)}
            grounds = Grounds(links, ways.gap, ways.margin, len(ways.strains), lead)
            few = replace(removed(way), grounds=grounds)
            if self.sharing == "off":
                return few
            shared = replace(few, layers=tuple(range(depth)), shared=nearest(depth, few.layers))
            return shared if self.sharing == "on" or nats(shared) < nats(few) - EQUAL else few


def judged(ways: Ways, nats: Callable[[Kept], float]) -> tuple[Kept, float | None]:
    """Return the best of several ways, and by how many nats a token it is better than the next; None without another.

    What a way must be better by grows without bounds with its strain, so that it is no matter whether one at the
    margin is among them.
    """
    first = next(iter(ways.strains))
    if len(ways.strains) == 1:
        return first, None
    costs = {
        way: nats(way) + STRAIN * strain / (ways.margin - strain) if strain else nats(way)
        for way, strain in ways.strains.items()
    }
    best, after = sorted(costs.values())[:2]
    return min(way for way, cost in costs.items() if cost <= best + EQUAL), after - best


def nearest(depth: int, kept: Sequence[int]) -> dict[int, int]:
    """Map each layer that is not kept to the nearest one that is; of two the right one."""
    missing = sorted(set(range(depth)) - set(kept))
    return {layer: min(kept, key=lambda other: (abs(other - layer), -other)) for layer in missing}


def pooled(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return each layer's output for each example, (layers, n, d) fp32 on the CPU.

    Raises ValueError without examples, and on values that are not finite.
    Tokens are averaged with the weight of token t being t (Muennighoff, arXiv 2202.08904, eq. 1), padding with 0.
    """
    if sum(len(batch.mask) for batch in batches) < 2:
        raise ValueError("comparing layers needs at least two calibration examples; give calibration text")
    stack = layers(model)
    pools: list[list[Tensor]] = [[] for _ in stack]
    weights = torch.empty(0)

    def keep(at: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            pools[at].append(torch.einsum("btd,bt->bd", hidden.float(), weights).cpu())

        return hook

    def note(batch: Batch) -> None:
        nonlocal weights
        weights = batch.mask.cumsum(dim=1) * batch.mask.float()
        weights = weights / weights.sum(dim=1, keepdim=True)

    read(model, batches, [layer.register_forward_hook(keep(at)) for at, layer in enumerate(stack)], note=note)
    states = torch.stack([torch.cat(examples) for examples in pools])
    if strange := (~states.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist():
        raise ValueError(f"layer {strange[0]} gives values that are not finite on the calibration text")
    return states
