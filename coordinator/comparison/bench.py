"""What all candidates of a comparison are measured with, and what is the same for many of them."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offsite.coordinator.attacks import scored
from offsite.coordinator.bound import of_base, tuned
from offsite.coordinator.comparison.plan import Plan
from offsite.coordinator.comparison.rows import Answered, Attacked, Predicted, Score
from offsite.coordinator.comparison.texts import Texts
from offsite.coordinator.store.finished import Finished
from offsite.emulator import methods, modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.evaluation.attack import STARTS, Attacker, Start, family
from offsite.emulator.methods import Method
from offsite.emulator.modality import Batch
from offsite.emulator.precision import DTYPES
from offsite.emulator.zoo.tasks import LocalTask
from offsite.protos import figures
from offsite.protos.documents import to_plain
from offsite.protos.figures import BASE_TUNED, BASE_ZERO_SHOT
from offsite.protos.spec import Choice

Tell = Callable[[str, int, int], None]  # what, step, of how many


@dataclass(frozen=True)
class Bench:
    """The plan, the base as it is trained on, its texts, and what was measured before."""

    plan: Plan
    folder: Path
    base: nn.Module
    tokenizer: Any
    texts: Texts
    tasks: tuple[LocalTask, ...]
    finished: Finished
    identity: dict[str, Any]  # all that any figure depends on, beside the candidate
    tell: Tell

    @property
    def device(self) -> torch.device:
        """Where models are."""
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights."""
        return DTYPES[self.plan.training.precision]

    def own(self) -> nn.Module:
        """Return the base with modules of its own, of the same tensors."""
        return restack(self.base, range(len(layers(self.base))))

    def train(self, model: nn.Module, method: Method, places: Mapping[int, int], what: str) -> nn.Module:
        """Return a model tuned as a site does, on what a site would have."""
        training = replace(self.plan.training, learning_rate=self.plan.learning_rate)
        return tuned(
            *(model, method, places, self.texts.train, training),
            tell=lambda step, steps, loss: self.tell(what, step, steps),
        )

    def score(self, model: nn.Module) -> Score:
        """Measure what a model can do; raises ValueError if what it predicts is not finite."""
        answers: dict[str, Answered] = {}
        if self.tasks:
            from offsite.emulator.evaluation.accuracy import accuracy

            self.tell("asking the tasks' questions", 0, 1)
            results = accuracy(model, self.tokenizer, self.tasks, limit=self.plan.limit)
            answers = {name: Answered(**asdict(one)) for name, one in results.items()}
        return Score(
            held_out=_predicted(model, self.texts.held_out),
            general=_predicted(model, self.texts.general),
            accuracy=answers,
        )

    def attacked(
        self, models: Mapping[Start, nn.Module], depends: dict[str, Any], *, state: Path
    ) -> tuple[Attacked, ...]:
        """Attack an emulator, from these starts, on what a site would have and on public text."""
        plan = self.plan
        attacks = family(plan.attack_steps, starts=STARTS, public=True, task=True, longest=plan.attack_longest)
        attacker = Attacker(
            models,
            steps=plan.attack_steps,
            task=self.texts.train,
            public=self.texts.public,
            batch_size=plan.training.batch_size,
            rate=plan.attack_learning_rate,
            healing_rate=plan.attack_learning_rate,
            seed=plan.training.seed,
            state=state,
            tell=lambda what, step, steps, _: self.tell(what, step, steps),
        )
        mine = [one for one in attacks if one.start in models]
        scores = scored(mine, attacker, self.score, cls=Score, finished=self.finished, depends=depends)
        return tuple(Attacked(start=one.start, healing=one.healing, steps=one.steps, score=scores[one]) for one in mine)

    def zero_shot(self) -> Score:
        """Measure the base as it is, once."""
        return self.finished(Score, self.identity | {"figure": BASE_ZERO_SHOT}, lambda: self.score(self.base))

    def bound(self, method: Choice, trained: Iterable[int]) -> Score:
        """Measure the base tuned itself, once for all candidates that train the same in the same layers."""
        choice = of_base(method)
        places = {layer: layer for layer in trained}

        def score() -> Score:
            way = methods.make(choice.name, choice.settings)
            return self.score(self.train(self.own(), way, places, "tuning the base, the bound"))

        depends = self.identity | {"figure": BASE_TUNED, "method": to_plain(choice), "trained": list(places)}
        return self.finished(Score, depends, score)


def _predicted(model: nn.Module, batches: list[Batch]) -> Predicted:
    likelihood = modality.score(model, batches)
    if not math.isfinite(likelihood.total):
        raise ValueError(
            f"the model predicts held-out text with a loss of {likelihood.total}; a lower learning rate may help"
        )
    score = figures.Score(nll=likelihood.total, tokens=likelihood.count)
    return Predicted(nll=likelihood.total, tokens=likelihood.count, perplexity=figures.perplexity([score]))
