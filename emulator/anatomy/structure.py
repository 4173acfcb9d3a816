"""Where a language model keeps its layers and their linear maps, told by structure and never by class."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

_FAMILIES = "transformers.models."


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
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            # A wrapper, as peft's, puts its own names before the path.
            if f".{path}".endswith(f".{named}") if named else len({type(block) for block in module}) == 1:
                lists[path] = module
    if len(lists) != 1:
        what = f"at the path {named!r} (config.anatomy)" if named else "of equal class"
        raise ValueError(
            f"{type(model).__name__}: looked for one list of {depth} blocks {what} (config.num_hidden_layers) "
            f"and found {len(lists)}{': ' + ', '.join(lists) if lists else ''}; say where the layers of such a family "
            'are in its config.json: "anatomy": {"layers": "model.layers"}'
        )
    return Anatomy(*lists.popitem())


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
    """Return the paths of a layer's linear maps; kinds with a forward of their own, as routers, are none."""
    return [
        path
        for path, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not type(module).forward.__module__.startswith(_FAMILIES)
    ]


def adaptable(layer: nn.Module) -> list[str]:
    """Return the paths of the linear maps that an adapter can sit on whatever computes the layer.

    Not those that choose experts, whose choice has no gradient; nor what state-space kernels read past the module.
    """
    scans = {path for path, module in layer.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")}

    def fits(path: str) -> bool:
        around, _, name = path.rpartition(".")
        parents = path.split(".")
        chooses = "router" in parents or (
            "gate" in parents and hasattr(layer.get_submodule(".".join(parents[: parents.index("gate")])), "experts")
        )
        return not chooses and (around not in scans or name.startswith("in_proj"))

    return [path for path in linears(layer) if fits(path)]


def positions(model: nn.Module) -> int | None:
    """Return for how many positions a model has a table, learned or computed; None if it needs none."""
    config = text_config(model)
    most = getattr(config, "max_position_embeddings", None)
    tables = [
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.ndim == 2 and ("wpe" in name or "position" in name) and most and tensor.shape[0] >= most
    ]
    return int(most) if most and tables else None


def experts(*stack: nn.Module) -> int:
    """Count the parameters of layers' experts that are held as one tensor, no linear maps; shared ones once."""
    held = {
        id(parameter): parameter.numel()
        for layer in stack
        for module in layer.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3 and not isinstance(module, _ConvNd)
    }
    return sum(held.values())


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a linear map y = W x stores W as (d_in, d_out), as GPT-2 does."""
    return isinstance(module, Conv1D)


def shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a linear map y = W x."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.get_parameter("weight").shape
    return columns, rows
