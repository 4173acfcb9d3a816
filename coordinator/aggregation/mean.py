"""FedAvg (McMahan et al., arXiv 1602.05629): the weighted mean of every tensor.

Exact for methods of which the weights are linear in the tensors, as in whole layers or the grids of a common sketch:
the mean of the adapters is that of the weights. For others, such as bottlenecks, it is the usual approximation.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from offsite.coordinator.aggregation.base import Origin, Version, joined
from offsite.kernels.schema import Rule, Schema, TensorMap, Tensors, Tier
from offsite.protos import tensors
from offsite.protos.documents import document
from offsite.protos.errors import InputError


@document
class Mean:
    """Average every tensor by itself."""

    name: ClassVar[str] = "mean"
    rules: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    exact: ClassVar[frozenset[Rule]] = frozenset({Rule.MEAN, Rule.FIXED})
    linear: ClassVar[bool] = True
    mixed_tiers: ClassVar[bool] = False
    needs: ClassVar[Literal["updates", "sum"]] = "sum"

    def begin(self, last: Version, schema: Schema) -> "TensorMean":
        """Open a round; nothing is kept of the last."""
        return TensorMean(schema)

    def join(self, parts: Sequence[Version]) -> Version:
        """See `Separable`."""
        return joined(parts)


class TensorMean:
    """The running mean of tensors by name; those that are fixed stay as they are."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._mean: Tensors = {}

    def add(self, update: TensorMap, origin: Origin) -> None:
        """Take one site's tensors of the schema; raises InputError if they differ in shape, or where they may not."""
        if isinstance(update, tensors.Reader):
            self._add_files([(update, origin)])
            return
        weight = torch.tensor([origin.weight])  # which multiplies a small tensor in half the time that a float takes
        for key, field in self._schema.items():
            tensor, mean = update[key], self._mean.get(key)
            if field.rule is Rule.FIXED:
                self._hold(key, tensor, origin)
                continue
            if mean is not None:
                _check_shape(key, mean, tensor.shape, origin)
            share = (weight if tensor.ndim and tensor.dtype is weight.dtype else origin.weight) * tensor
            self._mean[key] = share if mean is None else mean.add_(share)

    def _hold(self, key: str, tensor: Tensor, origin: Origin) -> None:
        """Take what is fixed, the same at all sites."""
        held = self._mean.setdefault(key, tensor)
        _check_shape(key, held, tensor.shape, origin)
        if not torch.equal(held, tensor):
            raise InputError(f"{key} is fixed, but another at {origin.site} than at others")

    def add_together(self, updates: Sequence[tuple[TensorMap, Origin]]) -> None:
        """See `Together`: of files, a block of the mean takes that of each before the next one is looked at."""
        files = [(update, origin) for update, origin in updates if isinstance(update, tensors.Reader)]
        if len(files) == len(updates):
            self._add_files(files)
            return
        for update, origin in updates:
            self.add(update, origin)

    def _add_files(self, updates: Sequence[tuple[tensors.Reader, Origin]]) -> None:
        """Do the same bit for bit, but read what is averaged a block at a time, which a core's cache holds."""
        buffer = memoryview(bytearray(tensors.PIECE_BYTES))
        for key, field in self._schema.items():
            if field.rule is Rule.FIXED:
                for update, origin in updates:
                    self._hold(key, update[key], origin)
                continue
            for update, origin in updates:
                dtype, shape = update.entries[key]
                if key not in self._mean:  # -0.0 plus anything is that, 0.0 would make 0.0 of -0.0
                    self._mean[key] = torch.full(shape, -0.0, dtype=tensors.DTYPES[dtype])
                _check_shape(key, self._mean[key], shape, origin)
            mean, begin = self._mean[key].view(-1), 0
            streams = [(update.blocks(key, buffer), origin.weight) for update, origin in updates]
            while begin < len(mean):
                end = min(len(mean), begin + len(buffer) // mean.element_size())
                for blocks, weight in streams:
                    _add_block(mean[begin:end], next(blocks), weight)
                begin = end

    def finish(self, tiers: Iterable[Tier]) -> Version:
        """Close the round."""
        return Version(adapter=self._mean, broadcast=dict.fromkeys(tiers, self._mean))


def _check_shape(key: str, mean: Tensor, shape: tuple[int, ...], origin: Origin) -> None:
    if mean.shape != shape:  # torch would broadcast a size of 1
        raise InputError(
            f"a mean needs equal shapes, {key} is {list(shape)} at {origin.site} and {list(mean.shape)} at others; use "
            "a strategy for sites of mixed tiers"
        )


def _add_block(mean: Tensor, block: Tensor, weight: float) -> None:
    """Add a weighted block, and write over it: in this thread alone, as others fold other groups meanwhile.

    NumPy does so with blocks of any size, torch with small ones; NumPy has no bfloat16, and rounds weights to 16 bits.
    """
    if block.dtype in (torch.float32, torch.float64):
        total, share = mean.numpy(), block.numpy()
        np.multiply(share, weight, out=share)
        np.add(total, share, out=total)
        return
    for total_piece, piece in zip(*(torch.split(one, tensors.ALONE) for one in (mean, block)), strict=True):
        total_piece.add_(weight * piece)
