"""Several adapters of one base that answer together, and copies of a model that share what they have in common.

Of each next token an ensemble takes the largest probability that some expert gives it, and normalises:

    p(v) = max_e p_e(v) / sum_u max_e p_e(u)        (LAE, Gao et al., arXiv 2303.10070, there for classes)
"""

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from offsite.emulator.anatomy.structure import layers


class Ensemble(nn.Module):
    """Language models as one, whose logits are log-probabilities; it keeps no cache, for each would need its own."""

    def __init__(self, experts: Mapping[str, nn.Module]) -> None:
        """Take the models by name, in the order in which they are asked."""
        super().__init__()
        self.names, self.experts = tuple(experts), nn.ModuleList(experts.values())
        self.config = self.experts[0].config

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """Return what the experts' own forward passes give, together; raises ValueError if it is given a cache."""
        if kwargs.get("past_key_values") is not None:
            raise ValueError("an ensemble answers whole sequences, and goes on from no past_key_values; leave them out")
        kwargs |= {"use_cache": False}
        return CausalLMOutput(logits=together(expert(*args, **kwargs).logits for expert in self.experts))


def together(logits: Iterable[Tensor]) -> Tensor:
    """Return log p (..., v), fp32, of experts' logits (..., v), of which no more than two are held at a time."""
    largest = reduce(torch.maximum, (one.float().log_softmax(dim=-1) for one in logits))
    return largest - largest.logsumexp(dim=-1, keepdim=True)


def twin(model: nn.Module, own: Collection[int]) -> nn.Module:
    """Return a copy of a model that has parameters of its own in some layers, by place, and shares all others."""
    apart = {id(one) for place in own for one in _tensors(layers(model)[place])}
    return deepcopy(model, {id(one): one for one in _tensors(model) if id(one) not in apart})


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(), module.buffers())
