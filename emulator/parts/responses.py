"""What a model loses where the responses of some layers are made small."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.modality import Batch


@torch.no_grad()
def losses(model: nn.Module, batch: Batch, draws: Sequence[Sequence[int]], response: float) -> list[float]:
    """Return the mean loss in nats a target of one batch for each draw of places whose responses are made small.

    A layer's response is what it adds to the hidden states (b, t, d) that it reads; `response` is what is left of it.
    The model stays as it is.
    """
    training, device = model.training, next(model.parameters()).device
    batch = batch.to(device)
    model.eval()
    try:
        measured: list[float] = []
        for places in draws:
            with ExitStack() as hooks:
                for place in places:
                    hooks.enter_context(_suppressed(layers(model)[place], response))
                measured.append(float(modality.loss(model, batch)))
        return measured
    finally:
        model.train(training)


@contextmanager
def _suppressed(layer: nn.Module, response: float) -> Iterator[None]:
    def hook(_module: nn.Module, arguments: Any, named: Any, output: Any) -> Any:
        read: Tensor = arguments[0] if arguments else named["hidden_states"]
        if isinstance(output, tuple):
            return (torch.lerp(read, output[0].to(read.dtype), response), *output[1:])
        return torch.lerp(read, output.to(read.dtype), response)

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
