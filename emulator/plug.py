"""An adapter in the base: the plug-in, to be measured, or to be used."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from offsite.emulator.methods import Adapter, Method, own_format


def plug(base: nn.Module, method: Method, adapter: Adapter) -> nn.Module:
    """Put a recovered adapter into the base, in place; raises ValueError if it does not fit.

    One that its method attaches stays beside the weights, which keeps what rounding to the base's dtype would lose.
    """
    if method.attaches:
        return method.attach(base, _itself(adapter), adapter)
    method.merge(base, adapter)
    return base


def load(model: nn.Module, directory: Path, places: Mapping[int, int] | None = None) -> nn.Module:
    """Put a published adapter beside a model's weights, in place, and return the model with it.

    The folder is one that a run has published, in peft's format or in ours. `places` maps a place in the model to a
    layer of the base; a base needs none. Raises ValueError if the folder has no such adapter, or it does not fit.
    """
    if (directory / own_format.DOCUMENT).is_file():
        method, adapter = own_format.read(directory)
        return method.attach(model, places or _itself(adapter), adapter)
    if not (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory} has no adapter: neither peft's adapter_config.json nor {own_format.DOCUMENT}")
    from offsite.emulator.methods import peft_format, peft_hub  # bring peft, seconds slow

    if not peft_format.is_lora(directory):
        return peft_hub.load(model, directory, places)
    adapter, scales = peft_format.read(directory)
    return peft_format.attach(model, places or _itself(adapter), adapter, scales)


def _itself(adapter: Adapter) -> dict[int, int]:
    """The places in the base of the layers that an adapter is for."""
    return {layer: layer for layer in sorted({int(key.partition(".")[0]) for key in adapter})}
