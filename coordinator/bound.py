"""The bound of what a plug-in can reach: the base itself, tuned as a site tunes the emulator."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from offsite.emulator import methods
from offsite.emulator.methods import Method
from offsite.emulator.modality import Sample
from offsite.emulator.tuning.adapting import adapted
from offsite.emulator.tuning.rates import suited
from offsite.protos.documents import to_plain
from offsite.protos.spec import METHOD, Choice, LocalTraining, TrainingSpec


def of_base(method: Choice) -> Choice:
    """Return what trains the base itself: a run's usual method, where this one trains only what a builder makes."""
    return METHOD if methods.make(method.name, method.settings).needs else method


def tuned(
    model: nn.Module,
    method: Method,
    places: Mapping[int, int],
    samples: Sequence[Sample],
    training: TrainingSpec,
    *,
    state: Path | None = None,
    tell: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Tune a base or an emulator as `adapted` does, where nothing is said at the rate that suits method and model."""
    rate = training.learning_rate or suited(method.rate, model)
    rules = LocalTraining(**to_plain(training) | {"learning_rate": rate})
    return adapted(model, method, places, samples, rules, state=state, tell=tell)
