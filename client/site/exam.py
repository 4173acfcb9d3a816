"""How well a site's held-out rows are predicted, and what of that leaves: a sum at most, as the site's policy has it.

The policy's noise is Laplace's (Dwork et al., TCC 2006): each row counts as the mean of its tokens, cut to 0 .. CLIP
nats, so that another row in its place changes the sum by CLIP at most, and noise of scale CLIP / epsilon makes one
figure epsilon-differentially private in each held-out row. What a run tells adds up, two figures a round and one at the
end. The noise comes from the site's secret and the sum itself: who asks again for the same learns no more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from offsite.client.site.job import TrainerJob
from offsite.client.site.policy import Policy
from offsite.emulator import modality, objectives
from offsite.emulator.examples import Example
from offsite.emulator.modality import Batch
from offsite.protos.exams import Exam
from offsite.protos.figures import Score, perplexity
from offsite.protos.ranges import finite
from offsite.protos.security.draws import derive, stream

CLIP = 10.0  # nats a token: guessing among a vocabulary has about as many


@dataclass(frozen=True)
class HeldOut:
    """Examples that never train, and the secret of their site."""

    examples: Sequence[Example]
    secret: bytes


@dataclass(frozen=True)
class Paper:
    """Held-out rows as batches: one of each row."""

    rows: Sequence[Batch]
    policy: Policy
    secret: bytes

    def marks(self, model: nn.Module) -> list[modality.Score]:
        """Return the score of each row; every process measures all of them."""
        return [modality.score(model, [row]) for row in self.rows]

    def exam(self, before: Sequence[modality.Score], after: Sequence[modality.Score] | None) -> Exam | None:
        """Return what leaves the site of the scores of all rows, if something does."""
        if self.policy.figures == "withhold" or len(self.rows) < self.policy.min_held_out:
            return None
        return Exam(
            rows=len(self.rows),
            before=self._sum(before),
            after=self._sum(after) if after is not None else None,
            noised=self.policy.figures == "noise",
        )

    def _sum(self, marks: Sequence[modality.Score]) -> Score:
        if self.policy.figures != "noise":
            return plain_sum(marks)
        total = math.fsum(min(max(mark.mean, 0.0), CLIP) if math.isfinite(mark.mean) else CLIP for mark in marks)
        noise = _laplace(CLIP / self.policy.figure_epsilon, derive(self.secret, "figure", total.hex()))
        return Score(nll=total + noise, tokens=len(marks))


def paper(job: TrainerJob, held_out: HeldOut, tokenizer: Any) -> Paper:
    """Return the rows of an exam as the task's objective encodes them; what it cannot encode is left out."""
    spec, rows = job.task.training, list[Batch]()
    objective = objectives.make(spec.objective.name, spec.objective.settings)
    for example in held_out.examples:
        try:
            encoding = objective.encode(
                modality.default(), [example], tokenizer, max_length=spec.max_length, odd_rows="refuse"
            )
        except ValueError:
            continue
        rows.append(objective.text(encoding.samples))
    return Paper(rows, job.policy, held_out.secret)


def plain_sum(marks: Sequence[modality.Score]) -> Score:
    """Return the sum over all tokens of some rows."""
    return Score(nll=finite(math.fsum(mark.total for mark in marks)), tokens=sum(mark.count for mark in marks))


def shown(marks: Sequence[modality.Score]) -> float | None:
    """Return the perplexity of some rows for the site's own log; None where it is no finite number."""
    value = perplexity([plain_sum(marks)])
    return value if math.isfinite(value) else None


def _laplace(scale: float, key: bytes) -> float:
    """Draw from the Laplace distribution about zero, by the inverse of its distribution function."""
    centred = (int.from_bytes(stream(key)(8), "big") // 2**11 + 0.5) / 2**53 - 0.5
    return -scale * math.copysign(math.log1p(-2 * abs(centred)), centred)
