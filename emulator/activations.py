"""What goes on inside a model while it reads."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.modality import Batch

Map = tuple[int, str]  # the place of a layer, and the path of a linear map inside it


@torch.no_grad()
def read(
    model: nn.Module, batches: Iterable[Batch], hooks: Sequence[RemovableHandle], *, note: Callable[[Batch], None]
) -> None:
    """Have a model read batches, for what its hooks hear, and remove them; nobody reads its outputs.

    `note` hears each batch, on the model's device, before the model does.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for batch in (batch.to(device) for batch in batches):
            note(batch)
            modality.run(model, batch, keep=batch.last)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def mean_squares(model: nn.Module, inputs: Mapping[Map, int], batches: Sequence[Batch]) -> dict[Map, Tensor]:
    """Return the mean square of each input of linear maps over all tokens, (d_in,) fp64 on the CPU.

    `inputs` says for each map under which place it counts: that whose parameters it uses. Raises ValueError without
    batches.
    """
    if not batches:
        raise ValueError("to see what the linear maps are fed takes calibration text; give some")
    sums: dict[Map, Tensor] = {}
    tokens: Counter[Map] = Counter()
    real = torch.empty(0, dtype=torch.bool)  # which positions of a batch are not padding

    def listen(of: Map) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, -2)[real].double()
            sums[of] = sums.get(of, 0.0) + rows.square().sum(dim=0).cpu()
            tokens[of] += len(rows)

        return hook

    def note(batch: Batch) -> None:
        nonlocal real
        real = batch.mask.flatten().bool()

    stack = layers(model)
    hooks = [
        stack[place].get_submodule(path).register_forward_pre_hook(listen((source, path)))
        for (place, path), source in inputs.items()
    ]
    read(model, batches, hooks, note=note)
    return {of: total / tokens[of] for of, total in sums.items()}
