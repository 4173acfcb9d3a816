"""What a site could do with an emulator: unfreeze everything and train, in several ways.

The gap between plug-in and emulator that the literature calls privacy is measured with the emulator's middle frozen,
which nothing makes a site keep frozen. How far an attack comes depends on how well it is made, so that one attack alone
flatters the emulator: what counts is the strongest of a family.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.modality import Batch, Sample
from offsite.emulator.seeds import generator
from offsite.emulator.tuning.best import Best
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.emulator.tuning.rates import suited

RATE = 2e-4  # a learning rate that suits whole layers, whatever suited the adapter
HEALING_RATE = 3e-4  # and on public text
HEALING = 2  # healing before the task's text takes this many times the tuning's steps
LONGEST = 4  # and the longest attack this many
EVALUATION_BATCH = 8

Start = Literal["emulator", "tuned"]
Marks = Mapping[int, Callable[[nn.Module], None]]  # after so many steps, what to do with the best that there is by then
STARTS: tuple[Start, ...] = get_args(Start)


@dataclass(frozen=True)
class Attack:
    """One way to train all of an emulator; the steps are the most there are, as it ends early."""

    start: Start = "emulator"  # as it was handed out, or as the sites' adapter has tuned it
    healing: int = 0  # steps on public text, first
    steps: int = 0  # steps on the task's text, then

    @property
    def name(self) -> str:
        """What is done, with the steps."""
        done = {
            "tuned": self.start == "tuned",
            f"heal {self.healing}": self.healing,
            f"unfreeze {self.steps}": self.steps,
        }
        return ", ".join(part for part, is_part in done.items() if is_part) or "as it is"


def family(
    steps: int, *, starts: Collection[Start] = STARTS, public: bool, task: bool, longest: int = LONGEST
) -> tuple[Attack, ...]:
    """Return the attacks that can be made with these starts and texts, at once and `longest` times a tuning's steps.

    With the task's text: from every start, and on an emulator that was healed on public text first, where there is
    some. Without it: on public text alone. Raises ValueError if there is no text.
    """
    lengths = sorted({steps, longest * steps})
    if not task:
        if not public:
            raise ValueError("an attack trains on public text or on the task's, and there is neither")
        return tuple(Attack(start, healing=count) for start in starts for count in lengths)
    healed = [Attack(healing=HEALING * steps)] if public else []
    return (
        *healed,
        *(replace(begun, steps=count) for begun in (*healed, *map(Attack, starts)) for count in lengths),
    )


def most_steps(attacks: Collection[Attack]) -> int:
    """Return the optimiser steps that these attacks take together at most; longer ones go on from shorter ones."""
    healed, trained = dict[Start, int](), dict[tuple[Start, int], int]()
    for one in attacks:
        healed[one.start] = max(one.healing, healed.get(one.start, 0))
        trained[one.start, one.healing] = max(one.steps, trained.get((one.start, one.healing), 0))
    return sum(healed.values()) + sum(trained.values())


def state_bytes(model: nn.Module, attacks: Collection[Attack]) -> int:
    """Return the most bytes that the states of these attacks on a model take in their folder at one moment.

    A state is of five times the fp32 size: values, two moments, average and best. While one is written, the last one is
    still there, and beside them the state of the healing that came before.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    values = sum(parameter.numel() for parameter in model.parameters())
    values += sum(module.in_features * module.out_features for module in packed)
    return (3 if any(one.healing and one.steps for one in attacks) else 2) * 5 * values * torch.float32.itemsize


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
    samples: Sequence[Sample],
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    patience: int | None = None,
    at: Marks | None = None,
    state: Path | None = None,
    tell: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Return what a site makes of an emulator by training all of it on the text that it has; raises ValueError.

    Args:
        emulator: it stays as it is.
        samples: the text.
        schedule: how to train.
        dtype: to compute in, with fp32 parameters; the emulator's if none is given.
        patience: steps without getting better on a tenth of the text that is held back, after which it ends; what it
            returns is its best moment, the start included. None: all text, all steps and the last weights.
        at: with patience, after these steps, what to do with the best that there is so far.
        state: a file to go on from after a kill, of five times the emulator's fp32 size.
        tell: hears (steps done, steps, loss).
    """
    computed = dtype or next(emulator.parameters()).dtype
    twin, parameters = unfrozen(emulator)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(batch.mask.device.type, dtype=computed, enabled=computed != torch.float32):
            return modality.loss(model, batch)

    if patience is None:
        tune(twin, parameters, samples, schedule, loss=loss, state=state, tell=tell)
        return twin
    kept, held_back = divided(samples, seed=schedule.seed)
    exam = evaluation_batches(held_back, batch_size=EVALUATION_BATCH)
    device = next(twin.parameters()).device.type

    def missed() -> float:
        with torch.autocast(device, dtype=computed, enabled=computed != torch.float32):
            return modality.score(twin, exam).total

    best = Best(
        parameters,
        missed,
        every=max(1, patience // 2),
        patience=patience,
        at={step: partial(call, twin) for step, call in (at or {}).items()},
    )
    tune(twin, parameters, kept, schedule, loss=loss, state=state, every=patience, observer=best, tell=tell)
    best.restore()
    return twin


def divided(samples: Sequence[Sample], *, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return what an attacker trains on, and the tenth of its text that tells it when to end; raises ValueError."""
    if len(samples) < 2:
        raise ValueError("an attack that ends early holds text back: it takes at least two examples")
    order = torch.randperm(len(samples), generator=generator(seed, "held back by the attacker")).tolist()
    back = set(order[: max(1, len(samples) // 10)])
    return (
        [one for place, one in enumerate(samples) if place not in back],
        [one for place, one in enumerate(samples) if place in back],
    )


@dataclass(frozen=True)
class Attacker:
    """What a site that attacks has: models to start from, and texts; and for how long it tries."""

    models: Mapping[Start, nn.Module]
    steps: int  # of the tuning: so many without getting better end an attack
    task: Sequence[Sample] = ()
    public: Sequence[Sample] = ()
    batch_size: int = 4
    rate: float | None = None  # None: what suits whole layers of the model
    healing_rate: float | None = None
    seed: int = 0
    state: Path | None = None  # a folder, to go on from after a kill with what is left to do
    tell: Callable[[str, int, int, float], None] | None = None  # (what, steps done, steps, loss)

    def make(self, attacks: Collection[Attack], score: Callable[[Attack, nn.Module], None]) -> None:
        """Make these attacks, and have what each makes of the emulator scored; raises ValueError.

        Of attacks that begin alike the longer goes on from the shorter, and what was scored changes with that.
        """
        for start, model in self.models.items():
            mine = [one for one in attacks if one.start == start]
            if Attack(start) in mine:
                score(Attack(start), model)
            only_heal = {one.healing: partial(score, one) for one in mine if one.healing and not one.steps}
            for healing in sorted({one.healing for one in mine if one.steps}):
                begun = model
                if healing:
                    at = {healing: only_heal.pop(healing)} if healing in only_heal else {}
                    begun = self._train(model, start, "heal", healing, at)
                at = {one.steps: partial(score, one) for one in mine if one.steps and one.healing == healing}
                self._train(begun, start, f"unfreeze {healing}", max(at), at)
                self._forget(start)
            if only_heal:
                self._train(model, start, "heal", max(only_heal), only_heal)
                self._forget(start)

    def _forget(self, start: Start) -> None:
        """Remove what attacks that are done could have gone on from."""
        for path in self.state.glob(f"{start}-*") if self.state else ():
            path.unlink()

    def _train(self, model: nn.Module, start: Start, what: str, steps: int, at: Marks) -> nn.Module:
        emulator, tell = self.models[start], self.tell
        text, rate = self.task, self.rate or suited(RATE, emulator)
        if what == "heal":
            text, rate = self.public, self.healing_rate or suited(HEALING_RATE, emulator)
        return attack(
            model,
            text,
            Schedule(steps, rate, batch_size=self.batch_size, seed=self.seed),
            dtype=next(emulator.parameters()).dtype,
            patience=self.steps,
            at=at,
            state=self.state / f"{start} {what} {steps}.safetensors".replace(" ", "-") if self.state else None,
            tell=partial(tell, f"attack: {start}, {what}") if tell else None,
        )
