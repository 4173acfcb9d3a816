"""Adapters of peft's types other than LoRA, which peft itself draws, attaches, merges and writes.

An adapter holds what trains, by peft's own names: "28.self_attn.q_proj.ia3_l". What peft derives from settings and
shapes, as the random matrices that all maps of VeRA share, is in no adapter: every end derives it anew, and an export
has it for those that load it. Beside `peft_format`, the only file that opens peft.
"""

import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.pytorch_utils import Conv1D

from offsite.emulator import catalogue
from offsite.emulator.anatomy.structure import find, is_transposed, shape
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Adapter, Averaged, Kind
from offsite.emulator.methods.targets import Modules
from offsite.emulator.outline import NARROWED
from offsite.emulator.quiet import quiet
from offsite.emulator.seeds import generator
from offsite.kernels.schema import Tier

_WRAPPER = "base_model.model"  # where peft keeps the model that it was given


@dataclass(frozen=True)
class PeftMethod(Averaged):
    """A type of peft's by its name; the fields that a subclass adds are settings of peft's own configuration.

    Its tensors are averaged each by itself. That is the mean of the changes where a weight is linear in them.
    """

    modules: Modules = "all-linear"

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    spares: ClassVar[frozenset[str]] = frozenset({NARROWED})
    attaches: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.REPARAMETERISED
    linear: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    rate: ClassVar[float] = 3e-3  # LoRA's; nobody searched for a type's own
    constants: ClassVar[Mapping[str, Any]] = {}  # of peft's settings, without which a start would change the model

    def __post_init__(self) -> None:
        """Check the ranges."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value <= 0 and value != field.default:  # seeds are 0
                raise ValueError(f"{field.name} must be positive, got {value}")

    def fits(self, model: nn.Module, places: Mapping[int, int]) -> None:
        """Raise ValueError if a layer has none of the maps, or peft cannot put this type on one of them."""
        self.start(model, places, seed=0)

    def start(self, model: nn.Module, places: Mapping[int, int], *, seed: int, tier: Tier = "") -> Adapter:
        """Return what peft draws for each map alone, of its shape and not of its weights. Raises ValueError.

        It has values though what is around it be fake, for torch moves no module of fake tensors that are in use.
        """
        adapter: Adapter = {}
        path = find(model).path
        with unset_fake_temporarily(), quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("error", UserWarning)  # a setting that peft would change to one that fits
            for name, linear in self._maps(model, places).items():
                position, _, inside = name.removeprefix(f"{path}.").partition(".")
                key = f"{places[int(position)]}.{inside}"
                torch.default_generator.manual_seed(generator(seed, key).initial_seed())
                try:
                    alone = self._wrap(_shell({name: _blank(linear)}), name)
                except (ValueError, TypeError, NotImplementedError, UserWarning) as error:  # of its shape, or its kind
                    raise ValueError(f"peft has no {self.name} for {key} {shape(linear)}: {error}") from error
                live = _live(alone, f"{_WRAPPER}.{path}", {int(position): places[int(position)]})
                adapter |= {key: parameter.detach().clone() for key, parameter in live.items()}
        return adapter

    def attach(self, model: nn.Module, places: Mapping[int, int], adapter: Adapter) -> nn.Module:
        """Wrap the maps with peft, in place; raises ValueError if the adapter does not fit."""
        _check(adapter, places)
        names = self._maps(model, places)
        path = find(model).path
        with quiet():
            attached: nn.Module = self._wrap(model, *names, task=peft_format.task(model))
        _load(_live(attached, f"{_WRAPPER}.{path}", places), adapter)
        return attached

    def state(self, model: nn.Module, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off an attached model as CPU fp32 copies."""
        live = self.named_parameters(model, places)
        return {key: parameter.detach().to("cpu", torch.float32, copy=True) for key, parameter in live.items()}

    def named_parameters(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
        """Return the live parameters of an attached model by adapter key."""
        return _live(model, find(model).path, places)

    def recover(self, adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
        """Return the adapter; raises ValueError if one of its maps was narrowed, for what it lacks has no zero."""
        narrowed = {key.removesuffix(".shape") for key in recovery if key.endswith(".shape")}
        if clash := next((key for key in adapter if any(key.startswith(f"{name}.") for name in narrowed)), None):
            raise ValueError(f"{clash}: the emulator's map is narrower than the base's; train it with another method")
        return adapter

    def merge(self, base: nn.Module, adapter: Adapter) -> None:
        """Have peft merge copies of the maps in fp64, and take their values; raises ValueError if it does not fit."""
        maps, attached = self._beside(base, adapter)
        with quiet():
            merged = attached.merge_and_unload()
        with torch.no_grad():
            for name, linear in maps.items():
                for leaf, value in merged.get_submodule(name).named_parameters():
                    linear.get_parameter(leaf).copy_(value)

    def export(self, directory: Path, adapter: Adapter, *, base: nn.Module, base_name: str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained` on the base."""
        _, attached = self._beside(base, adapter)
        config = attached.peft_config["default"]
        config.task_type, config.base_model_name_or_path, config.inference_mode = (
            peft_format.task(base),
            base_name,
            True,
        )
        peft_format.save_config(directory, config)
        state = get_peft_model_state_dict(attached, save_embedding_layers=False)
        tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
            directory / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )

    def _maps(self, model: nn.Module, places: Mapping[int, int]) -> dict[str, nn.Module]:
        """Return the maps that train by their path from the model's root; raises ValueError if a layer has none."""
        anatomy = find(model)
        if beyond := [at for at in places if not 0 <= at < len(anatomy.layers)]:
            raise ValueError(f"the adapter is for layer {beyond[0]}, the model has {len(anatomy.layers)} layers")
        return {
            f"{anatomy.path}.{at}.{path}": anatomy.layers[at].get_submodule(path)
            for at, paths in peft_format.maps(model, places, self.modules, method=self.name).items()
            for path in paths
        }

    def _wrap(self, model: nn.Module, *names: str, task: str | None = None) -> Any:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[self.name.upper()]]
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "modules"}
        if "fan_in_fan_out" in {field.name for field in fields(kind)}:
            settings["fan_in_fan_out"] = any(is_transposed(model.get_submodule(name)) for name in names)
        config = kind(task_type=task, target_modules=sorted(names), **settings, **self.constants)
        return _peft(model, config)

    def _beside(self, base: nn.Module, adapter: Adapter) -> tuple[dict[str, nn.Module], Any]:
        """Return the base's maps by path, and copies of them in fp64 to which the adapter is attached."""
        itself = {int(key.partition(".")[0]): int(key.partition(".")[0]) for key in adapter}
        maps = self._maps(base, itself)
        with quiet():
            attached = self._wrap(_shell({name: deepcopy(linear).double() for name, linear in maps.items()}), *maps)
        _load(_live(attached.double(), f"{_WRAPPER}.{find(base).path}", itself), adapter)
        return maps, attached


def load(model: nn.Module, directory: Path, places: Mapping[int, int] | None) -> nn.Module:
    """Put an exported adapter of any of peft's types into a model, in place; raises ValueError if it does not fit.

    `places` maps a place in the model to the layer of the base that it stands for; None: the model is the base.
    """
    position = {str(layer): str(at) for at, layer in (places or {}).items()}
    layers = re.compile(rf"(?<={re.escape(find(model).path)}\.)\d+(?=\.)")

    def moved(name: str) -> str:
        return name if places is None else layers.sub(lambda layer: position.get(layer[0], "absent"), name, count=1)

    config = PeftConfig.from_pretrained(directory)
    catalogue.METHODS.make(str(config.peft_type.value).lower(), {})  # refuses what is none of them
    config.target_modules = sorted(map(moved, config.target_modules))
    for name in ("rank_pattern", "alpha_pattern"):  # of DoRA: names too, as patterns
        if pattern := getattr(config, name, None):
            own = {re.escape(moved(re.sub(r"\\(.)", r"\1", key))): value for key, value in pattern.items()}
            setattr(config, name, own)
    config.base_model_name_or_path = None  # is the model's, wherever it was read from
    state = load_file(directory / "adapter_model.safetensors")
    with quiet():
        attached: nn.Module = _peft(model, config)
        odd = set_peft_model_state_dict(attached, {moved(name): tensor for name, tensor in state.items()})
    if odd.unexpected_keys:
        raise ValueError(f"{directory}: the model has no place for {odd.unexpected_keys[0]}")
    return attached


def _peft(model: nn.Module, config: Any) -> Any:
    # The default, of which torch warns where nobody chose it.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    return get_peft_model(model, config).train(model.training)


def _shell(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a tree that has these modules at their paths, and nothing else."""
    root = nn.Module()
    for name, module in modules.items():
        *parents, leaf = name.split(".")
        holder = root
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(leaf, module)
    return root


def _blank(linear: nn.Module) -> nn.Module:
    """Return a map of zeros with the shape of another, from which no start can learn what that one is."""
    d_out, d_in = shape(linear)
    blank = (
        Conv1D(d_out, d_in)
        if is_transposed(linear)
        else nn.Linear(d_in, d_out, getattr(linear, "bias", None) is not None)
    )
    return blank.requires_grad_(False)


def _live(model: nn.Module, path: str, places: Mapping[int, int]) -> dict[str, nn.Parameter]:
    """Return what trains of a wrapped model by adapter key, given the path of its layers."""
    return {
        f"{layer}.{map_path}.{name.replace('.default', '').removesuffix('.weight').replace('.', '_')}": parameter
        for position, layer in places.items()
        for map_path, module in model.get_submodule(f"{path}.{position}").named_modules()
        if isinstance(module, BaseTunerLayer)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _check(adapter: Adapter, places: Mapping[int, int]) -> None:
    """Raise ValueError unless an adapter's layers are those that train."""
    ids = {key.partition(".")[0] for key in adapter}
    if ids != {str(layer) for layer in places.values()}:
        raise ValueError(f"the adapter is for layers {sorted(ids)}, but those that train are {sorted(places.values())}")


def _load(live: Mapping[str, nn.Parameter], adapter: Adapter) -> None:
    """Fill live parameters; raises ValueError naming a key that is missing, one too many or of another shape."""
    if odd := sorted(live.keys() ^ adapter.keys()):
        raise ValueError(f"the adapter {'lacks' if odd[0] in live else 'has a key that the model lacks,'} {odd[0]!r}")
    for key, parameter in live.items():
        if parameter.shape != adapter[key].shape:
            raise ValueError(f"{key!r} {tuple(adapter[key].shape)} does not fit, expected {tuple(parameter.shape)}")
    with torch.no_grad():
        for key, parameter in live.items():
            parameter.copy_(adapter[key])
