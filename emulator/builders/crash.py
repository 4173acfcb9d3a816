"""CRaSh (Zhang et al., EMNLP 2023, arXiv 2310.15477): clustering, removing and sharing of layers, without training.

Layers are compared by linear CKA of their pooled outputs, and the chain of layers is cut at its weakest links; each
segment keeps one layer. The paper merges the most similar neighbours again and again; as the score is that of the two
layers at the border, and never changes, cutting at the smallest links gives the same segments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy import layers
from offsite.emulator.batches import Batch
from offsite.emulator.builders.base import Outline, ends, kept_of, middle
from offsite.emulator.fidelity import likelihood
from offsite.emulator.stack import restack
from offsite.kernels.cka import adjacent_cka

GUARD_BATCHES = 2  # on which sharing is judged; where it fails it fails by factors, not by percents


@dataclass(frozen=True)
class Crash:
    """Keeps `keep` distinct layers in all, one per segment of similar ones; `bottom` + `top` of them train.

    With train="ends" those are the outermost, and segments are formed of the rest; with "spread" all layers form
    segments and those that train are spread over the kept ones, as in the paper. Sharing fills the gaps with the
    nearest kept layer: "off", "on", or "auto" if the calibration text is then better predicted.
    """

    keep: int | None = None  # distinct layers in all, ends included; None: four fifths
    bottom: int = 2
    top: int = 2
    train: Literal["ends", "spread"] = "ends"
    sharing: Literal["off", "auto", "on"] = "off"

    name: ClassVar[str] = "crash"

    def outline(self, model: nn.Module, batches: Sequence[Batch]) -> Outline:
        """Decide by how `model` represents the calibration text; raises ValueError if the settings do not fit."""
        depth = len(layers(model))
        keep = kept_of(depth, self.keep)
        inner = middle(depth, keep=keep, bottom=self.bottom, top=self.top)
        links = adjacent_cka(pooled(model, batches)).tolist()
        if self.train == "ends":
            trainable = ends(depth, bottom=self.bottom, top=self.top)
            cut = segments(links[inner.start : inner.stop - 1], keep - len(trainable))
            kept = sorted({*trainable, *(inner[representative(segment)] for segment in cut)})
        else:
            kept = [representative(segment) for segment in segments(links, keep)]
            trainable = tuple(kept[at] for at in spread(keep, self.bottom + self.top))
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


def segments(links: Sequence[float], count: int) -> list[range]:
    """Cut a chain of len(links) + 1 layers at its count - 1 smallest links; of equal ones the first."""
    weakest = sorted(range(len(links)), key=lambda at: links[at])[: count - 1]
    borders = [0, *(at + 1 for at in sorted(weakest)), len(links) + 1]
    return [range(start, stop) for start, stop in zip(borders, borders[1:], strict=False)]


def representative(segment: range) -> int:
    """Return the middle layer of a segment, the upper one of two."""
    return segment[len(segment) // 2]


def spread(count: int, trained: int) -> list[int]:
    """Choose `trained` of `count` indices: ceil(i (count-1)/(trained-1))."""
    return [0] if trained == 1 else [math.ceil(i * (count - 1) / (trained - 1)) for i in range(trained)]


def nearest(depth: int, kept: Sequence[int]) -> dict[int, int]:
    """Map each layer that is not kept to the nearest one that is; of two the right one."""
    missing = sorted(set(range(depth)) - set(kept))
    return {layer: min(kept, key=lambda other: (abs(other - layer), -other)) for layer in missing}


@torch.no_grad()
def pooled(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return each layer's output for each example, (layers, n, d) fp32 on the CPU. Raises ValueError without examples.

    Tokens are averaged with the weight of token t being t (Muennighoff, arXiv 2202.08904, eq. 1), padding with 0.
    """
    if sum(len(batch.input_ids) for batch in batches) < 2:
        raise ValueError("comparing layers needs at least two calibration examples; give calibration text")
    stack = layers(model)
    device = next(model.parameters()).device
    found: list[list[Tensor]] = [[] for _ in stack]
    weights = torch.empty(0)

    def keep(at: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[at].append(torch.einsum("btd,bt->bd", hidden.float(), weights).cpu())

        return hook

    handles = [layer.register_forward_hook(keep(at)) for at, layer in enumerate(stack)]
    training = model.training
    model.eval()
    try:
        for batch in (batch.to(device) for batch in batches):
            weights = batch.attention_mask.cumsum(dim=1) * batch.attention_mask.float()
            weights = weights / weights.sum(dim=1, keepdim=True)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=1, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(examples) for examples in found])
