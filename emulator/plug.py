"""An adapter in the base: the plug-in, to be measured, or to be used."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.ensemble import Ensemble, twin
from offsite.emulator.methods import Adapter, Method, own_format

ENSEMBLE = "ensemble.json"  # how several published adapters answer together, and the folder of each


def plug(base: nn.Module, method: Method, adapter: Adapter) -> nn.Module:
    """Put a recovered adapter into the base, in place; raises ValueError if it does not fit.

    One that its method attaches stays beside the weights, which keeps what rounding to the base's dtype would lose.
    """
    if method.attaches:
        return method.attach(base, _itself(adapter), adapter)
    method.merge(base, adapter)
    return base


def plug_all(base: nn.Module, method: Method, adapters: Mapping[str, Adapter]) -> nn.Module:
    """Put recovered adapters into a base, that answer together where they are several; raises ValueError as `plug`.

    The model is the base itself for one adapter, else an ensemble whose experts share all layers but these adapters'.
    """
    if len(adapters) == 1:
        return plug(base, method, *adapters.values())
    return Ensemble({name: plug(twin(base, _itself(one)), method, one) for name, one in adapters.items()})


def load(model: nn.Module, directory: Path, places: Mapping[int, int] | None = None) -> nn.Module:
    """Put a published adapter beside a model's weights, in place, and return the model with it.

    The folder is one that a run has published, in peft's format or in ours. `places` maps a place in the model to a
    layer of the base; a base needs none. Of a folder that has several adapters, as a run's that ends in an ensemble,
    these answer together. Raises ValueError if the folder has no such adapter, or it does not fit.
    """
    if (directory / ENSEMBLE).is_file():
        combine, folders = experts(directory)
        if combine != "max":
            choice = ", ".join(str(folder.relative_to(directory)) for folder in folders.values())
            raise ValueError(
                f"{directory / ENSEMBLE}: of its adapters one has to be chosen (combine = {combine!r}); load one of "
                f"the folders {choice}"
            )
        whole = range(len(layers(model)))
        return Ensemble({name: load(twin(model, whole), one, places) for name, one in folders.items()})
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


def experts(directory: Path) -> tuple[str, dict[str, Path]]:
    """Return how the adapters of a folder with several answer together, and by name the folder of each.

    It is "max", of each token the largest probability that one gives it, or "route", where one has to be chosen. Raises
    ValueError.
    """
    document = directory / ENSEMBLE
    try:
        written = json.loads(document.read_text())
        folders = {str(name): directory / folder for name, folder in written["experts"].items()}
        combine = str(written["combine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{document}: expected how adapters answer together, got {type(error).__name__}") from None
    if not folders:
        raise ValueError(f"{document}: it names no adapter")
    return combine, folders


def _itself(adapter: Adapter) -> dict[int, int]:
    """The places in the base of the layers that an adapter is for."""
    return {layer: layer for layer in sorted({int(key.partition(".")[0]) for key in adapter})}
