"""What a site can tell of an emulator it was handed, from its tensors and from a few of the site's own texts.

An owner who designs the frozen layers can make an identity pipe of them: they hand the text's embeddings on unchanged
to layers that train, whose change then gives the text away (PEFTLeak, arXiv 2506.04453). What is looked for are the
signs of that attack as published, and of its next of kin: layers that turn the embeddings into something else, but each
word by itself, so that a word can still be told by what becomes of it. An emulator without these signs may still be
hostile. So this is one check beside the site's bounds on steps and rounds, and no proof.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers, text_config
from offsite.emulator.modality import Batch

# What honest emulators of SmolLM2-135M stay clear of, those too harsh to be of use included, and pipes do not:
UNCHANGED = 1e-2  # ||layer(h) - h|| / ||h||; theirs is 0.2 and more
EMBEDDED = 0.99  # cosine of what a layer reads with the embeddings; theirs is 0.05 and less
APART = 1e-2  # ||h' - h|| / ||h|| of what a layer reads of a word after other words; theirs is 0.1 and more


@dataclass(frozen=True)
class Findings:
    """What was measured; `change` and `likeness` are medians over the tokens of the texts."""

    infinite: tuple[str, ...]  # parameters and buffers that hold a value that is not finite
    likelihood: modality.Score  # of the targets of the site's texts
    vocabulary: int
    change: dict[int, float]  # frozen place -> ||layer(h) - h|| / ||h||
    likeness: dict[int, float]  # training place, not 0 -> |cosine| of what it reads with what place 0 reads
    context: dict[int, float]  # the same place -> ||h' - h|| / ||h|| of what it reads of a word after other words

    @property
    def perplexity(self) -> float:
        """Perplexity of the emulator on the site's texts."""
        return self.likelihood.perplexity

    def suspicions(self) -> list[str]:
        """Return a sentence for each sign of a broken or hostile emulator; none if it looks honest.

        A large perplexity is no sign: honest emulators of few layers have up to a thousand times that of guessing.
        """
        if self.infinite:
            return [f"{name} holds values that are not finite" for name in self.infinite]
        signs = [] if math.isfinite(self.likelihood.total) else ["its loss on the site's own text is not finite"]
        signs += [
            f"the frozen layer at place {place} hands its input on unchanged: relative change {change:.2g}, "
            f"expected above {UNCHANGED:g}"
            for place, change in self.change.items()
            if not change > UNCHANGED
        ]
        signs += [
            f"the training layer at place {place} still reads the embeddings of the text: cosine {cosine:.4f}, "
            f"expected below {EMBEDDED:g}"
            for place, cosine in self.likeness.items()
            if not cosine < EMBEDDED
        ]
        signs += [
            f"the training layer at place {place} reads each word apart from those before it: they change what it "
            f"reads by {change:.2g}, expected above {APART:g}"
            for place, change in self.context.items()
            if not change > APART
        ]
        return signs


def inspect(model: nn.Module, batches: Sequence[Batch], places: Mapping[int, int]) -> Findings:
    """Measure an emulator on a few texts; the keys of `places` are those that train. Raises ValueError without text.

    The adapter may be attached or not. Cost: two forward passes over the texts.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    infinite = tuple(name for name, tensor in tensors if not bool(torch.isfinite(tensor).all()))
    total = modality.Score(0.0, 0)
    changes: dict[int, list[Tensor]] = {}
    cosines: dict[int, list[Tensor]] = {}
    contexts: dict[int, list[Tensor]] = {}
    for batch in batches:
        other, kept = modality.disturb(model, batch)
        with _watched(model) as seen:
            total += modality.score(model, [batch])
        with _watched(model) as elsewhere:
            modality.score(model, [other])
        real = batch.mask.bool().cpu()
        for place, (read, change, cosine) in seen.items():
            if place not in places:
                changes.setdefault(place, []).append(change[real])
            elif place:
                cosines.setdefault(place, []).append(cosine[real])
                moved = (elsewhere[place].read - read)[kept].norm(dim=-1) / read[kept].norm(dim=-1)
                if len(moved):
                    contexts.setdefault(place, []).append(moved)
    if not total.count:
        raise ValueError("an emulator is inspected on some of the site's own texts, and none was given")
    return Findings(
        infinite, total, text_config(model).vocab_size, _medians(changes), _medians(cosines), _medians(contexts)
    )


def _medians(measures: Mapping[int, list[Tensor]]) -> dict[int, float]:
    """A median, because the few tokens that all others attend to have huge states that an honest layer may keep."""
    return {place: float(torch.cat(values).median()) for place, values in measures.items()}


class _Seen(NamedTuple):
    """What a layer reads (b, t, d), how much it changes it and how much that is like the embeddings, both (b, t)."""

    read: Tensor
    change: Tensor
    cosine: Tensor


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[int, _Seen]]:
    """Note of the next forward pass, place by place, what is seen of each token."""
    seen: dict[int, _Seen] = {}
    embedded = torch.empty(0)

    def watch(place: int) -> Any:
        def hook(_module: nn.Module, arguments: Any, named: Mapping[str, Any], output: Any) -> None:
            nonlocal embedded
            before = (arguments[0] if arguments else named["hidden_states"]).float()
            after = (output[0] if isinstance(output, tuple) else output).float()
            embedded = embedded if place else before
            change = (after - before).norm(dim=-1) / before.norm(dim=-1)
            cosine = functional.cosine_similarity(before, embedded, dim=-1)
            seen[place] = _Seen(before.cpu(), change.cpu(), cosine.abs().cpu())  # a change of sign hides nothing

        return hook

    handles = [layer.register_forward_hook(watch(place), with_kwargs=True) for place, layer in enumerate(layers(model))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
