"""Proof that narrow layers are the full ones with what was pruned masked."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import is_transposed, layers, shape


@torch.no_grad()
def prove(full: nn.Module, narrow: nn.Module, columns: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless each narrow layer computes, in fp32, what the full one does with pruned inputs at zero.

    A family may be like one of the table in its names and still use its maps otherwise; so may one that is described.
    `columns` has, for each place, those that are kept of the maps that lost some.
    """
    for place, (arguments, named) in _calls(full, columns).items():
        whole, small = (copy.deepcopy(layers(model)[place]).float().eval() for model in (full, narrow))
        for path, kept in columns[place].items():
            linear = whole.get_submodule(path)
            gone = torch.ones(shape(linear)[1], dtype=torch.bool).index_fill(0, kept, False)
            weight = linear.get_parameter("weight")
            (weight if is_transposed(linear) else weight.T)[gone.to(weight.device)] = 0
        try:
            expected, actual = (_first(layer(*arguments, **named)) for layer in (whole, small))
        except RuntimeError as error:
            raise ValueError(f"layers of this family cannot be narrowed as described: {error}") from None
        off = (actual - expected).norm() / (expected - _first((*arguments, *named.values()))).norm()
        if not off <= 1e-3:
            raise ValueError(
                f"layer {place} is off by {off:.1e} from the full one with what was pruned at zero: this family uses "
                'its maps otherwise than described (see "fused" in config.anatomy); leave that part whole'
            )


def _calls(model: nn.Module, places: Iterable[int]) -> dict[int, Any]:
    """Return what layers are called with on a few tokens: positional and named arguments, with fp32 tensors."""
    calls: dict[int, Any] = {}

    def listen(place: int) -> Any:
        def hook(_module: nn.Module, arguments: Any, named: Any) -> None:
            calls[place] = tree_map_only(
                Tensor, lambda t: t.float() if t.is_floating_point() else t, (arguments, named)
            )

        return hook

    handles = [layers(model)[at].register_forward_pre_hook(listen(at), with_kwargs=True) for at in places]
    training = model.training
    try:
        modality.run(model.eval(), modality.default().probe(model, rows=1, length=8))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return calls


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
