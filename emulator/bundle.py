"""An emulator as files: a model folder of its distinct layers, one file each, from which the stack is built again."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from offsite.emulator import formats
from offsite.emulator.anatomy.narrow import fit
from offsite.emulator.anatomy.stack import follow, restack
from offsite.emulator.anatomy.structure import find, linears, shape
from offsite.emulator.checkpoint import Checkpoint, skeleton
from offsite.emulator.formats import Format
from offsite.emulator.formats.packed import PackedLinear, packed
from offsite.emulator.outline import Draft, Outline
from offsite.emulator.quiet import quiet
from offsite.emulator.zoo.files import INDEX, one_line
from offsite.emulator.zoo.weights import ADAPTER, CODE

Shapes = dict[int, dict[str, tuple[int, int]]]  # place -> path inside the layer -> (d_out, d_in)


@dataclass(frozen=True)
class Layout:
    """What a reader must know beside the files: which layer is where, and in which places maps are not the base's."""

    outline: Outline
    format: Format | None = None
    packed: tuple[int, ...] = ()  # places whose maps are stored in `format`
    narrow: Shapes = field(default_factory=dict)  # of the maps with fewer rows or columns than the base's

    @property
    def stored(self) -> dict[int, int]:
        """Place -> number of the layer in the folder, for all places."""
        index = {place: number for number, place in enumerate(self.outline.own)}
        shared = self.outline.shared
        return {place: index[shared.get(place, place)] for place in range(len(self.outline.layers))}


class Described(Protocol):
    """What describes a layout in a manifest."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The base's layer at each place."""
        ...

    @property
    def trainable(self) -> tuple[int, ...]:
        """The base's layers that train."""
        ...

    @property
    def shared(self) -> dict[int, int]:
        """Place -> place whose parameters it has."""
        ...

    @property
    def packed(self) -> Any:
        """None, or a `format` with name and settings, and the `places` that have it."""
        ...

    @property
    def narrow(self) -> Shapes:
        """The shapes of the maps that are narrower than the base's."""
        ...


def described(manifest: Described) -> Layout:
    """Return the layout that a manifest describes; raises ValueError if it contradicts itself or names no format."""
    outline = Outline(layers=manifest.layers, trainable=manifest.trainable, shared=manifest.shared)
    named = {*manifest.shared.values(), *manifest.narrow, *(manifest.packed.places if manifest.packed else ())}
    if strange := sorted(named - {*outline.own}):
        raise ValueError(f"the manifest: place {strange[0]} is none of those with parameters of their own")
    if lost := sorted({*manifest.shared} - {*range(len(manifest.layers))}):
        raise ValueError(f"the manifest: shared names place {lost[0]}, there are {len(manifest.layers)}")
    if manifest.packed is None:
        return Layout(outline, narrow=manifest.narrow)
    format = formats.make(manifest.packed.format.name, manifest.packed.format.settings)
    return Layout(outline, format, manifest.packed.places, manifest.narrow)


def layout_of(draft: Draft) -> Layout:
    """Look at an emulator and say how it is stored; raises ValueError if its maps have several formats."""
    stack, base = find(draft.model).layers, find(draft.base).layers
    formats: set[Format] = set()
    packed_at: set[int] = set()
    narrow: Shapes = {}
    for place in draft.outline.own:
        original = base[draft.outline.layers[place]]
        for path in linears(stack[place]):
            linear = stack[place].get_submodule(path)
            if isinstance(linear, PackedLinear):
                formats.add(linear.format)
                packed_at.add(place)
            if shape(linear) != shape(original.get_submodule(path)):
                narrow.setdefault(place, {})[path] = shape(linear)
    if len(formats) > 1:
        raise ValueError("the emulator's maps are stored in several formats; a bundle has one")
    return Layout(draft.outline, next(iter(formats), None), tuple(sorted(packed_at)), narrow)


def save(
    model: nn.Module, tokenizer: Any, directory: Path, *, outline: Outline, dtype: torch.dtype | None = None
) -> None:
    """Write an emulator: `config.json`, safetensors files with shared tensors once, and the tokenizer's files.

    `dtype` is that of the weights on disk, if they are to have another; it does not concern tensors of a format.
    """
    distinct: Any = restack(model, outline.own)
    anatomy = find(distinct)
    once = _cast(_once(distinct), dtype, but=_parts(distinct))

    def layer(number: int) -> dict[str, Tensor]:
        prefix = f"{anatomy.path}.{number}."
        return {name.removeprefix(prefix): tensor for name, tensor in once.items() if name.startswith(prefix)}

    rest = {name: tensor for name, tensor in once.items() if not name.startswith(f"{anatomy.path}.")}
    _write(directory, distinct.config, tokenizer, anatomy.path, rest, layer, depth=len(outline.own))


def copy(
    source: Checkpoint, model: nn.Module, tokenizer: Any, directory: Path, *, outline: Outline, dtype: torch.dtype
) -> None:
    """Write the emulator of a streamed model that only drops or shares layers, reading them one at a time.

    `dtype` is that of the checkpoint.
    """
    anatomy = find(model)
    config = type(model.config).from_dict(model.config.to_dict())  # type: ignore[operator, union-attr]
    sources = [outline.layers[place] for place in outline.own]
    follow(config.get_text_config(decoder=True), sources, len(anatomy.layers))
    config.dtype = dtype

    def layer(number: int) -> dict[str, Tensor]:
        return source.layer(model, sources[number])

    rest = {name: tensor for name, tensor in _once(model).items() if not name.startswith(f"{anatomy.path}.")}
    rest = _cast(rest, dtype)
    _write(directory, config, tokenizer, anatomy.path, rest, layer, depth=len(sources))


def load(directory: Path, *, layout: Layout, dtype: torch.dtype | str) -> tuple[nn.Module, Any]:
    """Read an emulator and its tokenizer; raises ValueError if the folder asks for code or lacks a tensor.

    `dtype` "auto" keeps the stored one; it does not concern tensors of a format, nor the type one computes in.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: not a model folder: config.json is missing")
    _refuse_code(directory)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = skeleton(config, dtype=config.dtype if dtype == "auto" else dtype)
    except (OSError, KeyError) as error:
        raise ValueError(f"{directory}: not a model folder: {one_line(error)}") from None
    tensors = _tensors(directory)
    _shape(model, tensors, layout)
    _fill(model, tensors, directory, dtype)
    return restack(model, list(layout.stored.values())), tokenizer


def _once(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors by name, those with several names under their first."""
    seen: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if seen.setdefault(id(tensor), name) == name
    }


def _parts(model: nn.Module) -> set[str]:
    """Return the names of the tensors that matrices in a format are stored as."""
    return {
        f"{path}.{part}"
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for part in module.parts
    }


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, *, but: Collection[str] = ()) -> dict[str, Tensor]:
    """Return tensors of which those that are floating and not among `but` have this dtype."""
    return {
        name: tensor if name in but or not tensor.is_floating_point() else tensor.to(dtype or tensor.dtype)
        for name, tensor in tensors.items()
    }


def _write(
    directory: Path,
    config: Any,
    tokenizer: Any,
    path: str,
    rest: Mapping[str, Tensor],
    layer: Callable[[int], dict[str, Tensor]],
    *,
    depth: int,
) -> None:
    """Write one file per layer and one for the rest, with the index that transformers reads them by."""
    directory.mkdir(parents=True, exist_ok=True)
    with quiet():
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    index: dict[str, str] = {}

    def one(number: int, tensors: Mapping[str, Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{depth + 1:05d}.safetensors"
        plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(plain, directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    one(0, rest)
    for number in range(depth):
        one(number + 1, {f"{path}.{number}.{name}": tensor for name, tensor in layer(number).items()})
    document = {"metadata": {}, "weight_map": dict(sorted(index.items()))}
    (directory / INDEX).write_text(json.dumps(document, indent=1))


def _tensors(directory: Path) -> dict[str, Tensor]:
    source = Checkpoint.open(directory)
    try:
        return source.read(source.files)
    except SafetensorError as error:
        raise ValueError(f"{directory}: not a model folder: {one_line(error)}") from None


def _shape(model: nn.Module, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Give a model without weights the maps that its places have in the bundle; raises ValueError."""
    anatomy = find(model)
    stored = layout.stored
    if len(anatomy.layers) != len(layout.outline.own):
        raise ValueError(
            f"the weights do not fill the model: config.json describes {len(anatomy.layers)} layers, the manifest "
            f"{len(layout.outline.own)}"
        )
    for place, shapes in layout.narrow.items():
        fit(model, stored[place], shapes)
    for place in layout.packed:
        layer, prefix = anatomy.layers[stored[place]], f"{anatomy.path}.{stored[place]}."
        for path in linears(layer):
            assert layout.format is not None
            linear = layer.get_submodule(path)
            names = layout.format.shapes(*shape(linear))
            if f"{prefix}{path}.weight" in tensors:
                continue
            if missing := [name for name in names if f"{prefix}{path}.{name}" not in tensors]:
                raise ValueError(f"the weights do not fill the model: {prefix}{path}.{missing[0]} is missing")
            parts = {name: tensors[f"{prefix}{path}.{name}"] for name in names}
            layer.set_submodule(path, packed(linear, layout.format, parts))


def _fill(model: Any, tensors: dict[str, Tensor], directory: Path, dtype: torch.dtype | str) -> None:
    expected = model.state_dict()
    fault = f"{directory}: the weights do not fill the model its config.json describes"
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"{fault}: it has no {name}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{fault}: {name} is {tensor.dtype}, not {expected[name].dtype}")
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{fault}: {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
    cast = _cast(tensors, dtype if isinstance(dtype, torch.dtype) else None, but=_parts(model))
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"{fault}: {missing[0]} is missing")
    model.requires_grad_(False)


def _refuse_code(directory: Path) -> None:
    """Refuse what would make the loader import or download something that the folder names."""
    if (directory / ADAPTER).exists():
        raise ValueError(f"{directory}: it holds an {ADAPTER}, which names another model to load; remove it")

    for name in ("config.json", "tokenizer_config.json"):

        def check(document: dict[str, Any], name: str = name) -> dict[str, Any]:
            if code := sorted(CODE.intersection(document)):
                raise ValueError(f"{directory / name}: {code[0]!r} names code to load; a bundle carries none")
            return document

        if (directory / name).exists():
            json.loads((directory / name).read_text(encoding="utf-8"), object_hook=check)
