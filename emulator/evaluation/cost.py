"""What a step of training costs a client: floating-point operations, memory and processor time."""

import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from offsite.emulator import modality
from offsite.emulator.modality import Batch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of one optimiser step."""

    flops: int  # of matrix products and attention; a multiplication and an addition are two
    peak_bytes: int  # most bytes of tensors at a time: weights as stored, activations, gradients, moments
    cpu_s: float  # processor time of all threads, the least of the repeats


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Q K' and P V, of (b, heads, t, d); a causal mask saves nothing."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(_grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Q K' once more, then the gradients of P and V, and of Q and K."""
    return 2 * math.prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


# torch's counter knows the attention of GPUs and not that of CPUs.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are alive, each storage once, whoever keeps it."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self.bytes: int = 0
        self.peak: int = 0
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return output

    def _see(self, tensor: Tensor) -> None:
        # The storage's Python object lives as long as its memory, and saved tensors and views keep that.
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, id(storage))

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


def peak_bytes(action: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Return the most bytes of tensors alive at a time during an action: those `held` before it, and those it makes.

    What a kernel allocates for itself and frees again is not seen, on no device.
    """
    live = _Live(held)
    with live:
        action()
    return live.peak


def costs(
    candidates: Mapping[str, tuple[nn.Module, Mapping[str, nn.Parameter]]], batch: Batch, *, repeats: int = 3
) -> dict[str, Cost]:
    """Measure one AdamW step on a batch for models and their parameters that train, side by side in one run.

    The models' steps take turns, so that a busy machine is as unkind to each. Nothing is changed, as the learning rate
    is 0; everything but the parameters is left frozen. Raises ValueError.
    """
    if repeats < 1 or not all(parameters for _, parameters in candidates.values()):
        raise ValueError(f"each candidate needs parameters that train, and repeats must be at least 1, got {repeats}")
    measures: dict[str, Cost] = {}
    steps = {name: _Step(model, parameters, batch) for name, (model, parameters) in candidates.items()}
    for name, step in steps.items():
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            step()  # the first, which makes AdamW's moments, so that the next finds them
        measures[name] = Cost(counter.get_total_flops(), peak_bytes(step, step.held()), float("inf"))
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step()
            measures[name] = replace(measures[name], cpu_s=min(measures[name].cpu_s, time.process_time() - start))
    return measures


class _Step:
    """One step as a site takes it."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch) -> None:
        self._model, self._parameters = model, list(parameters.values())
        self._batch = batch.to(self._parameters[0].device)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0, weight_decay=0.0)

    def __call__(self) -> None:
        self._model.requires_grad_(False)  # anew, because candidates may share tensors
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        modality.loss(self._model, self._batch).backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def held(self) -> list[Tensor]:
        """Return what is in memory before a step."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        weights = chain(self._model.parameters(), self._model.buffers())
        return [*weights, *moments, *self._batch.tensors.values()]
