"""LoRAM (arXiv 2502.13533): train small, infer large. Layers lose MLP channels and KV groups, and no depth.

LoRA trains on the narrow model, and its factors go back to the base with zeros where something was pruned.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from offsite.emulator.activations import mean_squares
from offsite.emulator.anatomy.equivalence import prove
from offsite.emulator.anatomy.narrow import Part, Units, channels, groups, narrow
from offsite.emulator.anatomy.roles import heads, roles
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.builders.base import Material, Stage
from offsite.emulator.formats.packed import dense
from offsite.emulator.outline import NARROWED, REDUCTION, Draft, Outline
from offsite.emulator.precision import in_fp32


@dataclass(frozen=True)
class Loram:
    """Prunes a share of the MLP channels, and of the KV groups, of all layers but the base's `first` and `last` ones.

    What weighs least goes: by "weight" the product of the norms of what a unit owns of each map; by "activation" the
    norm of its columns of the last map, each times the RMS of its input on the calibration text.
    The attention stays whole in BLOOM, whose heads see positions by their number (ALiBi), and in multi-query attention,
    which has one KV group; to ask for less is an error.
    """

    mlp: float = 0.5  # share of the channels that goes
    attention: float = 0.0  # share of the KV groups that goes
    score: Literal["weight", "activation"] = "weight"
    first: int = 2
    last: int = 2

    name: ClassVar[str] = "loram"
    stage: ClassVar[Stage] = "width"
    provides: ClassVar[frozenset[str]] = frozenset({REDUCTION})
    needs: ClassVar[frozenset[str]] = frozenset()
    alters: ClassVar[frozenset[str]] = frozenset({NARROWED})
    trains_on_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 <= self.mlp < 1 and 0 <= self.attention < 1 and self.mlp + self.attention):
            raise ValueError(
                "mlp and attention are the shares that are pruned: each must be in [0, 1) and one of them above 0, "
                f"got {self.mlp} and {self.attention}"
            )
        if self.first < 0 or self.last < 0:
            raise ValueError(f"first and last count layers left intact, got {self.first} and {self.last}")

    @property
    def looks_at_text(self) -> bool:
        """Whether activations decide."""
        return self.score == "activation"

    def change(self, draft: Draft, material: Material) -> Draft:
        """Return the draft with narrower layers; raises ValueError if nothing can be pruned as asked."""
        outline = draft.outline
        every = range(len(outline.layers))
        model = restack(draft.model, every)  # with modules of its own to replace
        units = self.fits(model, outline, depth=len(layers(draft.base)))
        places = list(units)
        squares: dict[tuple[int, str], Tensor] = {}
        if self.looks_at_text:
            sources = {place: outline.shared.get(place, place) for place in every}
            inputs = {(at, kind.after.path): source for at, source in sources.items() for kind in units.get(source, {})}
            with in_fp32(draft.model):
                squares = mean_squares(draft.model, inputs, material.batches)
        recovery, columns = dict(draft.recovery), {place: dict[str, Tensor]() for place in places}
        for place, kinds in units.items():
            layer = layers(model)[place]
            for kind, stay in kinds.items():
                square = squares.get((place, kind.after.path))
                score = by_weight(layer, kind) if square is None else by_activation(layer, kind, square.sqrt())
                kept = score.argsort(descending=True, stable=True)[:stay].sort().values
                columns[place][kind.after.path] = kind.columns(kept)
                for name, index in narrow(layer, kind, kept).items():
                    recovery[f"{outline.layers[place]}.{name}"] = index
        prove(draft.model, model, columns)
        # Places that share their parameters share the new ones too.
        return replace(draft, model=restack(model, every, outline.shared), recovery=recovery)

    def fits(self, model: nn.Module, outline: Outline, *, depth: int) -> dict[int, dict[Units, int]]:
        """Return what is pruned at which place, and how many units of each kind stay; raises ValueError if none can be.

        The model may have no weights; `depth` is the base's.
        """
        places = [place for place in outline.own if self.first <= outline.layers[place] < depth - self.last]
        if not places:
            raise ValueError(
                f"no layer is left to prune: the emulator has {sorted({*outline.layers})} of the base's {depth} "
                f"layers, and the first {self.first} and the last {self.last} stay intact"
            )
        return {place: self._units(model, place) for place in places}

    def _units(self, model: nn.Module, place: int) -> dict[Units, int]:
        """Return what is pruned of a layer, and how many units of each kind stay."""
        layer, maps = layers(model)[place], roles(model, place)
        kinds: dict[Units, int] = {}
        if self.mlp:
            units = channels(layer, maps)
            kinds[units] = _stay("mlp", units, self.mlp)
        if self.attention:
            units = groups(layer, maps, heads(model))
            kinds[units] = _stay("attention", units, self.attention)
        return kinds


def _stay(setting: str, units: Units, share: float) -> int:
    pruned = min(round(share * units.count), units.count - 1)
    if not pruned:
        raise ValueError(
            f"{setting} = {share:g}: a layer has {units.count} {units.what}, of which this share is none, or all; "
            f"set {setting} to 0 to leave them whole"
        )
    return units.count - pruned


def by_weight(layer: nn.Module, units: Units) -> Tensor:
    """Score units by the product of the norms of what they own of each map, (units,) fp64: rounding decides nothing."""
    score = _norms(dense(layer.get_submodule(units.after.path)).double().norm(dim=0), units.after)
    for part in units.before:
        score = score * _norms(dense(layer.get_submodule(part.path)).double().norm(dim=1), part)
    return score


def by_activation(layer: nn.Module, units: Units, rms: Tensor) -> Tensor:
    """Score units by the norm of their columns, each times the RMS (d_in,) of its input; (units,) fp64."""
    return _norms(dense(layer.get_submodule(units.after.path)).double().norm(dim=0).cpu() * rms, units.after)


def _norms(each: Tensor, part: Part) -> Tensor:
    """From the norm of each row or column to that of all of a unit's."""
    norms: Tensor = torch.linalg.vector_norm(each.cpu()[part.index], dim=1)
    return norms
