"""How fast a method adapts a model, and the learning rate at which it does so at a given speed.

Memories that average over steps, as LAE does, leave as much of what was whichever method trains, so that all of these
should move a model alike in as many steps. LAE (Gao et al., arXiv 2303.10070) has a learnable scale for that on what an
adapter gives, which would make the change of a weight no product of two factors any more. A step of AdamW goes as far
as its rate, so that a rate does the same: it is calibrated before a run, on public text, by how far the model's
predictions move.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator import modality
from offsite.emulator.methods.base import Adapter, Method
from offsite.emulator.modality import Batch, Sample
from offsite.emulator.tuning.loop import Schedule, tune

STEPS = 8  # of a trial
PROBE = 4  # rows on which predictions are compared
TRIALS, NEAR = 8, 1.1  # how many at most, and how near, as a ratio, is near enough


class Trial:
    """An adapter in a model that trains for some steps, and begins anew each time."""

    def __init__(
        self, model: nn.Module, method: Method, places: Mapping[int, int], start: Adapter, samples: Sequence[Sample]
    ) -> None:
        """Take a model, which the adapter is put into in place, and public text."""
        self.model, self._samples = method.attach(model, places, start).eval(), samples
        self._live = method.named_parameters(self.model, places)
        self._start = {key: parameter.detach().clone() for key, parameter in self._live.items()}
        self._probe = modality.collate(samples[:PROBE]).to(next(iter(self._live.values())).device)
        self._before = _predicted(self.model, self._probe)

    def speed(self, schedule: Schedule) -> float:
        """Return KL(before || after) of what is predicted, in nats a target; infinite where training diverges."""
        with torch.no_grad():
            for key, parameter in self._live.items():
                parameter.copy_(self._start[key])
        try:
            tune(self.model, self._live, self._samples, schedule)
        except ValueError:  # a loss that is not finite
            return math.inf
        after = _predicted(self.model, self._probe)
        divergence = float(functional.kl_div(after, self._before, reduction="batchmean", log_target=True))
        return divergence if math.isfinite(divergence) else math.inf


def calibrated(trial: Trial, speed: float, schedule: Schedule) -> float:
    """Return the rate, of two digits, at which a trial has a speed; it is looked for from the schedule's rate on.

    Raises ValueError where no rate comes near the speed.
    """
    rate, reached = schedule.learning_rate, dict[float, float]()
    for _ in range(TRIALS):
        rate = float(f"{rate:.2g}")
        if rate in reached:
            break
        reached[rate] = trial.speed(replace(schedule, learning_rate=rate))
        if speed / NEAR <= reached[rate] <= speed * NEAR:
            return rate
        rate = _next(reached, speed)
    tried = ", ".join(f"{one:g}: {own:.3g}" for one, own in sorted(reached.items()))
    raise ValueError(
        f"no learning rate moves the emulator's predictions by {speed:g} nats in {schedule.steps} steps on public text "
        f"({tried}); ask for another speed, or give training.learning_rate"
    )


def _next(reached: Mapping[float, float], speed: float) -> float:
    """Return the rate to try next: between two on the line of their logarithms, beyond all as the divergence's root."""
    slower = max((rate for rate, own in reached.items() if own < speed), default=0.0)
    faster = min((rate for rate, own in reached.items() if own > speed), default=math.inf)
    if not slower or math.isinf(faster):
        last = slower or faster
        return last * min(max(math.sqrt(speed / max(reached[last], 1e-12)), 0.1), 10.0)
    way = 0.5
    if 0 < reached[slower] and math.isfinite(reached[faster]):
        way = math.log(speed / reached[slower]) / math.log(reached[faster] / reached[slower])
    return slower * math.pow(faster / slower, min(max(way, 0.1), 0.9))


@torch.no_grad()
def _predicted(model: nn.Module, batch: Batch) -> Tensor:
    """Return log-probabilities (n, v) of what a batch predicts."""
    return modality.predictions(model, batch).float().log_softmax(dim=-1)
