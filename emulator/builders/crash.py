"""CRaSh (Zhang et al., EMNLP 2023, arXiv 2310.15477): clustering, removing and sharing of layers, without training.

Layers are compared by linear CKA of their pooled outputs, and the chain of layers is cut at its weakest links; each
segment keeps one layer. The paper merges the most similar neighbours again and again; as the score is that of the two
layers at the border, and never changes, cutting at the smallest links gives the same segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from offsite.emulator.activations import read
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import Batch
from offsite.emulator.builders.base import Outline, Stage, droppable, kept_of
from offsite.emulator.evaluation.fidelity import likelihood
from offsite.emulator.placements import Placement
from offsite.kernels.cka import adjacent_cka, linear_cka

GUARD_BATCHES = 2  # on which sharing is judged; where it fails it fails by factors, not by percents


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
    looks_at_text: ClassVar[bool] = True
    trains_on_text: ClassVar[bool] = False

    def outline(self, model: nn.Module, batches: Sequence[Batch], placement: Placement) -> Outline:
        """Decide by how `model` represents the calibration text; raises ValueError if the settings do not fit."""
        depth = len(layers(model))
        keep, fixed = kept_of(depth, self.keep), placement.fixed(depth)
        inner = droppable(depth, keep=keep, fixed=fixed)
        found = pooled(model, batches)
        reduce = cluster if self.reduction == "cluster" else drop
        kept = sorted({*fixed, *(inner[at] for at in reduce(found[inner], keep - len(fixed)))})
        trainable = placement.choose(kept, depth)
        removed = Outline(tuple(kept), trainable)
        if self.sharing == "off":
            return removed
        shared = Outline(tuple(range(depth)), trainable, nearest(depth, kept))
        if self.sharing == "on":
            return shared
        few = batches[-GUARD_BATCHES:]  # the longest
        removed_text = likelihood(restack(model, removed.layers), few)
        shared_text = likelihood(restack(model, shared.layers, shared.shared), few)
        return shared if shared_text.nll < removed_text.nll else removed


def cluster(representations: Tensor, keep: int) -> list[int]:
    """Choose `keep` layers of (layers, n, d): the representatives of the segments between the weakest links."""
    return [representative(segment) for segment in segments(adjacent_cka(representations).tolist(), keep)]


def drop(representations: Tensor, keep: int) -> list[int]:
    """Choose `keep` layers of (layers, n, d): drop the right one of the most similar neighbours until they are left."""
    kept = list(range(len(representations)))
    links = adjacent_cka(representations).tolist()
    while len(kept) > keep:
        at = max(range(len(links)), key=links.__getitem__)
        del kept[at + 1], links[at]
        if at < len(links):  # the neighbour that is new
            links[at] = float(linear_cka(representations[kept[at]], representations[kept[at + 1]]))
    return kept


def segments(links: Sequence[float], count: int) -> list[range]:
    """Cut a chain of len(links) + 1 layers at its count - 1 smallest links; of equal ones the first."""
    weakest = sorted(range(len(links)), key=lambda at: links[at])[: count - 1]
    borders = [0, *(at + 1 for at in sorted(weakest)), len(links) + 1]
    return [range(start, stop) for start, stop in zip(borders, borders[1:], strict=False)]


def representative(segment: range) -> int:
    """Return the middle layer of a segment, the upper one of two."""
    return segment[len(segment) // 2]


def nearest(depth: int, kept: Sequence[int]) -> dict[int, int]:
    """Map each layer that is not kept to the nearest one that is; of two the right one."""
    missing = sorted(set(range(depth)) - set(kept))
    return {layer: min(kept, key=lambda other: (abs(other - layer), -other)) for layer in missing}


def pooled(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return each layer's output for each example, (layers, n, d) fp32 on the CPU. Raises ValueError without examples.

    Tokens are averaged with the weight of token t being t (Muennighoff, arXiv 2202.08904, eq. 1), padding with 0.
    """
    if sum(len(batch.input_ids) for batch in batches) < 2:
        raise ValueError("comparing layers needs at least two calibration examples; give calibration text")
    stack = layers(model)
    found: list[list[Tensor]] = [[] for _ in stack]
    weights = torch.empty(0)

    def keep(at: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[at].append(torch.einsum("btd,bt->bd", hidden.float(), weights).cpu())

        return hook

    def note(batch: Batch) -> None:
        nonlocal weights
        weights = batch.attention_mask.cumsum(dim=1) * batch.attention_mask.float()
        weights = weights / weights.sum(dim=1, keepdim=True)

    read(model, batches, [layer.register_forward_hook(keep(at)) for at, layer in enumerate(stack)], note=note)
    return torch.stack([torch.cat(examples) for examples in found])
