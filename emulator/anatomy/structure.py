"""Where a language model keeps its layers and their linear maps, told by structure and never by class."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Anatomy:
    """The layer stack of a model: its path from the root, and the list of layers itself."""

    path: str
    layers: nn.ModuleList


def text_config(model: nn.Module) -> Any:
    """Return the configuration that holds the depth of the language model."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def find(model: nn.Module) -> Anatomy:
    """Find the outermost list of `num_hidden_layers` blocks of one class; raises ValueError unless there is one.

    A model that needs it says where: `config.anatomy["layers"]` is then the list's path, whatever its classes.
    """
    depth = text_config(model).num_hidden_layers
    named = described(model).get("layers")
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            # A wrapper, as peft's, puts its own names before the path.
            if f".{path}".endswith(f".{named}") if named else len({type(block) for block in module}) == 1:
                found[path] = module
    if len(found) != 1:
        what = f"at the path {named!r} (config.anatomy)" if named else "of equal class"
        raise ValueError(
            f"{type(model).__name__}: looked for one list of {depth} blocks {what} (config.num_hidden_layers) "
            f"and found {len(found)}{': ' + ', '.join(found) if found else ''}; say where the layers of such a family "
            'are in its config.json: "anatomy": {"layers": "model.layers"}'
        )
    return Anatomy(*found.popitem())


def described(model: nn.Module) -> dict[str, Any]:
    """Return what a model's config.json says about its build, under "anatomy"; raises ValueError if it is no table."""
    table = getattr(model.config, "anatomy", None) or {}
    if not isinstance(table, dict):
        raise ValueError(f'config.json: "anatomy" must be a table such as {{"layers": "model.layers"}}, got {table!r}')
    return table


def layers(model: nn.Module) -> nn.ModuleList:
    """Return the layers of a model, in order."""
    return find(model).layers


def linears(layer: nn.Module) -> list[str]:
    """Return the paths of a layer's linear maps."""
    return [path for path, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a linear map y = W x stores W as (d_in, d_out), as GPT-2 does."""
    return isinstance(module, Conv1D)


def shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a linear map y = W x."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.get_parameter("weight").shape
    return columns, rows
