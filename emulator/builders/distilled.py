"""An emulator tuned by the owner on public text, so that it stands in better for what was dropped or narrowed."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.builders.base import Material, Stage
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.methods.base import Adapter, Method
from offsite.emulator.outline import REDUCTION, Draft, Outline
from offsite.emulator.tuning import distil, rates
from offsite.emulator.tuning.loop import Schedule, trainable_copy, tune

RATE = 3e-4


@dataclass(frozen=True)
class Distilled:
    """Tunes the frozen layers with the loss of Offsite-Tuning (arXiv 2302.04870); those that train stay as they are.

    Where no layer is frozen, it tunes those that are no longer the base's, such as the ones that loram narrowed.
    """

    steps: int = 200
    learning_rate: float | None = None  # None: RATE, as it suits the model
    batch_size: int = 4
    kd_weight: float = 30.0  # of the distance between hidden states
    lm_weight: float = 1.0  # of the loss of the text
    warmup_steps: int = 20
    seed: int = 0

    name: ClassVar[str] = "distilled"
    stage: ClassVar[Stage] = "tuning"
    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({REDUCTION})
    alters: ClassVar[frozenset[str]] = frozenset()
    looks_at_text: ClassVar[bool] = False
    trains_on_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.kd_weight, self.lm_weight) < 0 or self.kd_weight + self.lm_weight == 0:
            raise ValueError(
                f"kd_weight and lm_weight must not be negative, nor both 0, got {self.kd_weight} and {self.lm_weight}"
            )
        self.schedule(RATE)

    def schedule(self, suited: float) -> Schedule:
        """Return how it trains, at its own rate or at the one that suits the model; raises ValueError."""
        return Schedule(
            self.steps,
            suited if self.learning_rate is None else self.learning_rate,
            batch_size=self.batch_size,
            warmup_steps=min(self.warmup_steps, self.steps),  # realignment takes few steps
            decay="cosine",
            seed=self.seed,
        )

    def fits(self, model: nn.Module, outline: Outline, *, depth: int) -> list[int]:
        """Return the frozen places: layers of any shapes can be tuned."""
        return outline.frozen

    def change(self, draft: Draft, material: Material) -> Draft:
        """Return the draft with its tuned layers, in the dtypes they had; raises ValueError if they cannot be tuned.

        The folder `material.scratch` is the caller's to remove.
        """
        model, outline = draft.model, draft.outline
        places = tuned_places(draft.base, model, outline)
        teacher = _twin(draft.base)
        student = _distil(self, teacher, model, outline, places, material)
        return replace(draft, model=student, tuned=tuple(sorted({*draft.tuned, *places})))

    def realigned(
        self, draft: Draft, material: Material, *, steps: int, method: Method, adapter: Adapter, recovered: Adapter
    ) -> Draft:
        """Return the draft distilled again for what its sites have trained so far, without the adapter in it.

        As in FedBiOT (KDD 2024): the student has the adapter and the teacher is the base with it as `recovered`;
        neither trains. The given models stay as they were. Raises ValueError if the layers cannot be tuned.
        """
        outline = draft.outline
        teacher = method.attach(_twin(draft.base), {layer: layer for layer in outline.places.values()}, recovered)
        places = tuned_places(draft.base, draft.model, outline)
        values = hashlib.sha256()
        for key in sorted(adapter):
            values.update(key.encode() + adapter[key].detach().cpu().contiguous().numpy().tobytes())

        def attach(student: nn.Module) -> nn.Module:
            return method.attach(_twin(student), outline.places, adapter)

        purpose = f"realign {values.hexdigest()}"
        settings = replace(self, steps=steps)
        student = _distil(settings, teacher, draft.model, outline, places, material, attach=attach, purpose=purpose)
        return replace(draft, model=student, tuned=tuple(sorted({*draft.tuned, *places})))


def tuned_places(base: nn.Module, model: nn.Module, outline: Outline) -> list[int]:
    """Return the places to tune: the frozen ones, else those whose parameters differ from the base's.

    Raises ValueError if there are none, or if one of them is packed.
    """
    stack = layers(model)
    places = outline.frozen or [
        place for place in outline.own if not _equal(stack[place], layers(base)[outline.layers[place]])
    ]
    if not places:
        raise ValueError("there is nothing to distil: every layer trains and is the base's; drop or prune layers first")
    for place in places:
        for path, module in stack[place].named_modules():
            if isinstance(module, PackedLinear):
                raise ValueError(
                    f"the map {path} of layer {outline.layers[place]} is packed as {module.format.name} and cannot be "
                    f"tuned; put {Distilled.name} before what packs it"
                )
    return places


def _distil(
    settings: Distilled,
    teacher: nn.Module,
    model: nn.Module,
    outline: Outline,
    places: list[int],
    material: Material,
    *,
    attach: Callable[[nn.Module], nn.Module] = lambda student: student,
    purpose: str = "build",
) -> nn.Module:
    """Return a model with these places tuned; while they are, the student is what `attach` makes of it."""
    if not material.samples:
        raise ValueError("distilled trains on public text; give some")
    tuned = restack(model, range(len(outline.layers)), outline.shared)
    dtypes = {f"{place}.{name}": p.dtype for place in places for name, p in layers(tuned)[place].named_parameters()}
    parameters = trainable_copy(tuned, places)
    ends = distil.borders(outline, places, len(layers(teacher)))
    # The state of one build must not be taken for another's whose layers start from the same values.
    work = hashlib.sha256(f"{settings} {outline} {purpose}".encode()).hexdigest()
    tune(
        attach(tuned),
        parameters,
        material.samples,
        settings.schedule(rates.suited(RATE, model)),
        loss=distil.loss(teacher.eval(), ends, kd_weight=settings.kd_weight, lm_weight=settings.lm_weight),
        state=material.scratch and material.scratch / f"distilled-{work[:16]}.safetensors",
        tell=lambda step, steps, _: material.tell(settings.name, step, steps),
    )
    for name, parameter in parameters.items():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtypes[name])  # in place, so that what is shared stays shared
    return tuned


def _twin(model: nn.Module) -> nn.Module:
    """Return a model of the same tensors with modules of its own."""
    return restack(model, range(len(layers(model))))


def _equal(layer: nn.Module, other: nn.Module) -> bool:
    ours, theirs = dict(layer.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
