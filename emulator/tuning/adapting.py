"""How an adapter is trained: the rules of a site's steps, and of the owner's where figures compare with a site's."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from offsite.emulator import objectives, optimisers, parts, schedules
from offsite.emulator.batches import training_batches
from offsite.emulator.methods import Method
from offsite.emulator.methods.base import Choosing, Measuring, takes
from offsite.emulator.modality import Batch
from offsite.emulator.objectives import Objective
from offsite.emulator.optimisers import Estimator
from offsite.emulator.parts.training import freeze, select, whole_schema
from offsite.emulator.tuning.state import identity, resume, save

EVERY = 20  # steps between two states
OWNER = ""  # where a site has its name


class Chosen(Protocol):
    """A plug-in's name and its settings."""

    @property
    def name(self) -> str:
        """That it has in its family."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """As its family checks them."""


class Rules(Protocol):
    """What a run says of its local training."""

    @property
    def steps(self) -> int:
        """Steps of a round."""

    @property
    def batch_size(self) -> int:
        """Sequences of a step."""

    @property
    def learning_rate(self) -> float:
        """The highest rate."""

    @property
    def warmup_steps(self) -> int:
        """Steps of the schedule before the one that first has it."""

    @property
    def schedule(self) -> Chosen:
        """How the rate goes on from there."""

    @property
    def optimiser(self) -> Chosen:
        """What takes the steps."""

    @property
    def objective(self) -> Chosen:
        """What the steps lessen."""

    @property
    def before(self) -> int:
        """Steps of the schedule before this round."""

    @property
    def after(self) -> int:
        """And after it."""

    @property
    def part(self) -> Chosen:
        """What of the adapter trains."""

    @property
    def weight_decay(self) -> float:
        """Of all that trains."""

    @property
    def gradient_clipping(self) -> float:
        """Of the norm over all that trains."""

    @property
    def seed(self) -> int:
        """Of the order of the rows, and of dropout."""


def optimizer(parameters: Sequence[nn.Parameter], rules: Rules, *, first_step: int = 0) -> Optimizer:
    """Return a fresh optimiser for a round, of which so many steps led to it; raises ValueError on an unknown one."""
    return optimisers.make(rules.optimiser.name, rules.optimiser.settings).make(
        parameters,
        learning_rate=rules.learning_rate,
        weight_decay=rules.weight_decay,
        seed=rules.seed,
        first_step=first_step,
    )


def shares(rules: Rules) -> list[float]:
    """Return which share of the learning rate each step of a round has; raises ValueError on an unknown schedule."""
    schedule = schedules.make(rules.schedule.name, rules.schedule.settings)
    curve = schedule.curve(rules.before + rules.steps + rules.after, rules.warmup_steps)
    return [curve(rules.before + step) for step in range(rules.steps)]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Have the next step take this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def update(optimizer: Optimizer, parameters: Sequence[nn.Parameter], rules: Rules) -> None:
    """Take an optimiser step with the clipped gradients, or estimates of them, and forget them."""
    clip_grad_norm_(parameters, rules.gradient_clipping)
    optimizer.step()
    optimizer.zero_grad()


def adapt(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[Any],
    rules: Rules,
    *,
    state: Path | None = None,
    tell: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train the adapter in a model as a site of one process does in a first round; the model is left in training mode.

    A loss that is not finite does not end it: the model's figures say it. Raises ValueError on a state of other work.

    Args:
        model: what the adapter is in.
        parameters: of the adapter, those that train.
        samples: those of the objective.
        rules: how to train.
        state: a file to go on from after a kill, of the adapter and what the optimiser keeps; its owner's to remove.
        tell: hears (steps done, steps, loss).
    """
    objective = objectives.make(rules.objective.name, rules.objective.settings)
    samples = objective.refer(model, samples, batch_size=rules.batch_size)
    trained = list(parameters.values())
    device = trained[0].device
    stepper, share = optimizer(trained, rules), shares(rules)
    model.train()
    torch.manual_seed(rules.seed)  # of dropout
    draws = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    work = identity(parameters, samples, repr(rules)) if state else ""
    kept = {"draws": draws.get_state()}
    losses = resume(state, work, parameters, stepper, kept) if state and state.exists() else []
    draws.set_state(kept["draws"])
    for batch in training_batches(
        samples,
        batch_size=rules.batch_size,
        steps=rules.steps - len(losses),
        first_step=len(losses),
        seed=rules.seed,
        collate=objective.collate,
    ):
        set_rate(stepper, rules.learning_rate * share[len(losses)])
        losses.append(_lean(stepper, partial(_loss, objective, model, batch.to(device))))
        update(stepper, trained, rules)
        if state and (len(losses) % EVERY == 0 or len(losses) == rules.steps):
            save(state, work, parameters, stepper, losses, {"draws": draws.get_state()})
        if tell:
            tell(len(losses), rules.steps, losses[-1])


def _loss(objective: Objective, model: nn.Module, batch: Batch) -> Tensor:
    """Return what an objective has of a whole batch."""
    common = objective.common(model, batch)
    return objective.loss(model, batch, 0.0 if common is None else float(common))


def _lean(stepper: Optimizer, loss: Callable[[], Tensor]) -> float:
    """Give what trains its gradients, or estimates of them; return the loss."""
    if isinstance(stepper, Estimator):
        return stepper.estimate(lambda: float(loss()))
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    return float(value.detach())


def adapted(
    model: nn.Module,
    method: Method,
    places: Mapping[int, int],
    samples: Sequence[Any],
    rules: Rules,
    *,
    state: Path | None = None,
    tell: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Return a model with a method's adapter in it that was trained from its start; the model itself is used up.

    It trains the part of the adapter that a site called `OWNER` would in a first round. Raises ValueError as the part
    does, and as `adapt`.

    Args:
        model: a base or an emulator, with modules of its own.
        method: what is trained.
        places: place in the model -> layer of the base, of the layers that train.
        samples: those of the objective.
        rules: how to train.
        state: as in `adapt`.
        tell: as in `adapt`.

    Raises ValueError for a method that nobody can train from its start: it measures, or begins from what was measured.
    """
    if isinstance(method, Measuring) or takes(method):
        measures = isinstance(method, Measuring)
        why = "measures, and nothing trains" if measures else f"begins from the {takes(method)} that sites measure"
        raise ValueError(f"the method {method.name} {why}; choose one that trains from a start of its own")
    start = method.start(model, places, seed=rules.seed)
    model = method.attach(model, places, start)

    def first() -> Batch:
        text = objectives.make(rules.objective.name, rules.objective.settings).text
        asked: Any = {"batch_size": rules.batch_size, "steps": 1, "first_step": 0, "seed": rules.seed}
        return next(training_batches(samples, **asked, collate=text))

    if isinstance(method, Choosing):
        method.choose(model, places, first())
    part, turn = parts.make(rules.part.name, rules.part.settings), parts.Turn(rules.seed, 0, OWNER)
    selected = select(part, whole_schema(method, start), turn, model=model, places=places, batch=first)
    trained = freeze(method.named_parameters(model, places), selected)
    adapt(model, trained, samples, rules, state=state, tell=tell)
    return model
