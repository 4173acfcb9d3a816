"""The sequences that a model goes on with together, and what it has read of them: they come and go between passes."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

Pair = tuple[Tensor, Tensor]  # a layer's keys and values, each (n, heads, t, d)


@dataclass
class Rows:
    """Sequences that end at the same place: `mask` (n, t) is 1 where one has a token, and `cache` has as many."""

    mask: Tensor
    cache: DynamicCache

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def layers(self) -> list[Pair]:
        """The cache, layer by layer."""
        return [(layer.keys, layer.values) for layer in self.cache.layers]


def begin(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Rows]:
    """Read prompts; return the logits (n, v) of what comes next, and the rows."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    rows = Rows(torch.tensor(mask, device=model.device), DynamicCache())
    return _forward(model, torch.tensor(ids, device=model.device), rows), rows


def advance(model: Any, rows: Rows, tokens: Sequence[int]) -> Tensor:
    """Read one more token of each row, in place; return the logits (n, v) of what comes next."""
    rows.mask = functional.pad(rows.mask, (0, 1), value=1)
    return _forward(model, torch.tensor(tokens, device=model.device)[:, None], rows)


def join(first: Rows, second: Rows) -> Rows:
    """Return the rows of both, with room on the left where one is shorter."""
    width = max(one.mask.shape[1] for one in (first, second))
    masks = [functional.pad(one.mask, (width - one.mask.shape[1], 0)) for one in (first, second)]
    layers = [
        (_joined(a, c, width), _joined(b, d, width)) for (a, b), (c, d) in zip(first.layers, second.layers, strict=True)
    ]
    return Rows(torch.cat(masks), DynamicCache(layers))


def keep(rows: Rows, which: Sequence[int]) -> Rows:
    """Return some of the rows, without what was room for others alone."""
    kept = torch.tensor(which, device=rows.mask.device)
    mask = rows.mask[kept]
    first = int(mask.any(0).int().argmax())
    layers = [(keys[kept, :, first:], values[kept, :, first:]) for keys, values in rows.layers]
    return Rows(mask[:, first:], DynamicCache(layers))


def _joined(first: Tensor, second: Tensor, width: int) -> Tensor:
    return torch.cat([functional.pad(one, (0, 0, width - one.shape[2], 0)) for one in (first, second)])


def _forward(model: Any, ids: Tensor, rows: Rows) -> Tensor:
    taken = inspect.signature(model.forward).parameters
    places = (rows.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    given = {"position_ids": places, "logits_to_keep": 1}
    given |= {"cache" if "cache" in taken else "past_key_values": rows.cache}
    output = model(
        input_ids=ids,
        attention_mask=rows.mask,
        use_cache=True,
        **{name: value for name, value in given.items() if name in taken},
    )
    logits: Tensor = output.logits[:, -1].float()
    return logits
