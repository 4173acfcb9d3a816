"""What a site could do with an emulator: unfreeze everything and train. And what the owner may say of protection.

The gap between plug-in and emulator that the literature calls privacy is measured with the emulator's middle frozen,
which nothing makes a site keep frozen.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from offsite.emulator import likelihood
from offsite.emulator.batches import Batch, Encoded
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.likelihood import Likelihood
from offsite.emulator.tuning.loop import Schedule, tune

RATE = 2e-4  # a learning rate that suits whole layers, whatever suited the adapter


@dataclass(frozen=True)
class Attack:
    """What an attacked emulator reaches on the task's held-out text and on general text."""

    task: Likelihood
    general: Likelihood


@dataclass(frozen=True)
class Protection:
    """How far the attacks stay behind what the owner keeps, in nats a token; the least over all attacks."""

    task: float  # ln ppl(attack) - ln ppl(plug-in) on the task's text
    general: float  # ln ppl(attack) - ln ppl(base) on general text
    threshold: float | None
    label: Literal["protected", "not protected"]
    reason: str

    @property
    def margin(self) -> float:
        """The smaller of the two."""
        return min(self.task, self.general)


def unfrozen(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return an fp32 copy of an emulator in which everything trains, and its parameters, each once.

    Packed maps become dense. What places or embeddings and head share stays shared. The model is left as it is.
    """
    twin = copy.deepcopy(model)
    fresh: dict[object, nn.Parameter] = {}

    def own(weight: Tensor, *stored: Tensor) -> nn.Parameter:
        """Tell tensors apart by where they lie: places may share memory through parameters of their own."""
        key = tuple(part.data_ptr() for part in stored)
        return fresh.setdefault(key, nn.Parameter(weight.detach().float()))

    originals = list(twin.parameters())  # alive until all are replaced, so that no address is used twice
    for path, module in list(twin.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = own(module.weight, *module.parts.values())
            linear.bias = None if module.bias is None else own(module.bias, module.bias)
            twin.set_submodule(path, linear)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, own(parameter, parameter))
    del originals
    return twin.float(), dict(twin.named_parameters())  # the buffers as well


def attack(
    emulator: nn.Module,
    encoded: Sequence[Encoded],
    schedule: Schedule,
    *,
    tell: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Return what a site makes of an emulator by training all of it on the text that it has; raises ValueError.

    "unfreeze" is this on the site's own data, with the steps of the tuning; "heal" is this on public text. It computes
    in the emulator's dtype, with fp32 parameters.
    """
    dtype = next(emulator.parameters()).dtype
    twin, parameters = unfrozen(emulator)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(batch.input_ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return likelihood.loss(model, batch)

    tune(twin, parameters, encoded, schedule, loss=loss, tell=tell)
    return twin


def protection(
    attacks: Mapping[str, Attack], *, plug_in: Likelihood, base: Likelihood, threshold: float | None = None
) -> Protection:
    """Judge an emulator by the attacks on it; only a stated threshold (nats) that every margin reaches protects.

    `plug_in` is of the task's text, `base` of general text. Raises ValueError if there is no attack, if one has no
    finite likelihood, as an attack that failed shows nothing, and unless the threshold is positive.
    """
    if not attacks:
        raise ValueError("protection is measured by attacks, and none was given")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"the threshold of protection is in nats and must be positive, got {threshold}")
    task = {name: _mean(found.task, name) - _mean(plug_in, "plug-in") for name, found in attacks.items()}
    general = {name: _mean(found.general, name) - _mean(base, "base") for name, found in attacks.items()}
    least = min(task.values()), min(general.values())
    said = "; ".join(
        [_sentence(task, "the plug-in on the task's text"), _sentence(general, "the base on general text")]
    )
    if threshold is None:
        return Protection(*least, None, "not protected", f"no threshold was stated; {said}")
    if min(least) < threshold:
        return Protection(*least, threshold, "not protected", f"the stated {threshold:g} nats are not kept; {said}")
    reason = f"every attack made ({', '.join(attacks)}) stays behind by the stated {threshold:g} nats; {said}"
    return Protection(*least, threshold, "protected", reason)


def _mean(found: Likelihood, whose: str) -> float:
    mean = found.nll / found.tokens
    if not math.isfinite(mean):
        raise ValueError(f"{whose}: the likelihood is {mean} nats a token, which shows nothing; measure it anew")
    return mean


def _sentence(margins: Mapping[str, float], what: str) -> str:
    name = min(margins, key=margins.__getitem__)
    if margins[name] < 0:
        return f"the attack {name!r} is better than {what}, by {-margins[name]:.2f} nats"
    return f"the attack {name!r} comes within {margins[name]:.2f} nats of {what}"
