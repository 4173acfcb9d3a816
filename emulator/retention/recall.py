"""An objective that also keeps what a model predicted before it trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator import modality
from offsite.emulator.examples import OddRows, Reader
from offsite.emulator.modality.base import Batch, Encoding, Modality
from offsite.emulator.objectives.base import Objective


@dataclass(frozen=True)
class Recalled:
    """A sample, and what was predicted of its n targets: the likeliest tokens (n, k), and log-probabilities (n, k + 1).

    The last of these is that of all other tokens together.
    """

    one: Any
    tokens: Tensor = field(compare=False, repr=False)
    logs: Tensor = field(compare=False, repr=False)

    def __len__(self) -> int:
        """How long the sample is."""
        return len(self.one)


@dataclass(frozen=True, eq=False)
class RecalledBatch(Batch):
    """Rows, and what was predicted of their targets, padded to the most of a row: (b, n, k), (b, n, k + 1), (b,)."""

    rows: Batch
    tokens: Tensor
    logs: Tensor
    counts: Tensor

    @property
    def modality(self) -> str:  # type: ignore[override]
        """That of its rows."""
        return self.rows.modality

    @property
    def targets(self) -> int:
        """Those of its rows."""
        return self.rows.targets

    @property
    def mask(self) -> Tensor:
        """Likewise."""
        return self.rows.mask

    @property
    def samples(self) -> list[Any]:
        """Likewise."""
        return self.rows.samples

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return self._each(lambda tensor: tensor.to(device), self.rows.to(device))

    def packed(self) -> Self:
        """Have its rows run without padding."""
        return replace(self, rows=self.rows.packed())

    def share(self, rank: int, world: int) -> Self:
        """Return the rows of one of several processes."""
        return self._each(lambda tensor: tensor.tensor_split(world)[rank], self.rows.share(rank, world))

    def _each(self, do: Any, rows: Batch) -> Self:
        return replace(self, rows=rows, tokens=do(self.tokens), logs=do(self.logs), counts=do(self.counts))

    @property
    def recalled(self) -> tuple[Tensor, Tensor]:
        """The tokens and the log-probabilities of all targets, row by row."""
        real = torch.arange(self.tokens.shape[1], device=self.counts.device) < self.counts[:, None]
        return self.tokens[real], self.logs[real]


@dataclass(frozen=True)
class Recall:
    """An objective, and beside it how far predictions are from what they were; see `retention.distil`."""

    objective: Objective
    strength: float
    temperature: float
    k: int

    name: ClassVar[str] = "recall"
    paper: ClassVar[str] = "arXiv 1606.09282"
    compares: ClassVar[bool] = False

    def reader(self, kind: Modality) -> Reader:
        """Return that of the objective."""
        return self.objective.reader(kind)

    def encode(
        self, kind: Modality, examples: Sequence[Any], tokenizer: Any, *, max_length: int, odd_rows: OddRows
    ) -> Encoding:
        """Encode as the objective does."""
        return self.objective.encode(kind, examples, tokenizer, max_length=max_length, odd_rows=odd_rows)

    def refer(self, model: nn.Module, samples: Sequence[Any], *, batch_size: int) -> list[Any]:
        """Return samples with what the model predicts of them, without dropout; each is computed once."""
        samples = self.objective.refer(model, samples, batch_size=batch_size)
        distinct = sorted(dict.fromkeys(samples), key=len)
        device, training = next(model.parameters()).device, model.training
        known: dict[Any, Recalled] = {}
        model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(distinct), batch_size):
                    part = distinct[start : start + batch_size]
                    batch = self.objective.text(part).to(device)
                    logits = modality.predictions(model, batch)
                    tokens = logits.topk(min(self.k, logits.shape[1]), dim=1).indices
                    logs = coarse(logits / self.temperature, tokens)
                    counts = [batch.share(row, len(part)).targets for row in range(len(part))]
                    pairs = zip(torch.split(tokens.cpu(), counts), torch.split(logs.cpu(), counts), strict=True)
                    known |= {one: Recalled(one, *pair) for one, pair in zip(part, pairs, strict=True)}
        finally:
            model.train(training)
        return [known[one] for one in samples]

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of samples that were referred."""
        pad = nn.utils.rnn.pad_sequence
        return RecalledBatch(
            self.objective.collate([one.one for one in samples]),
            pad([one.tokens for one in samples], batch_first=True),
            pad([one.logs for one in samples], batch_first=True),
            torch.tensor([len(one.tokens) for one in samples]),
        )

    def text(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of the samples themselves, whether they were referred or not."""
        return self.objective.text([one.one if isinstance(one, Recalled) else one for one in samples])

    def common(self, model: nn.Module, batch: Any) -> Tensor | None:
        """Return that of the objective."""
        return self.objective.common(model, batch.rows)

    def loss(self, model: nn.Module, batch: Any, common: float = 0.0) -> Tensor:
        """Return the objective's loss with the divergence."""
        tokens, before = batch.recalled
        after = coarse(modality.predictions(model, batch.rows) / self.temperature, tokens)
        divergence = functional.kl_div(after, before, reduction="sum", log_target=True) / len(tokens)
        return self.objective.loss(model, batch.rows, common) + self.strength * self.temperature**2 * divergence


def coarse(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log-probabilities (n, k + 1) of some tokens (n, k) and of all others together, of logits (n, v)."""
    logs = functional.log_softmax(logits, dim=1)
    others = logs.scatter(1, tokens, -torch.inf)
    rest = (
        others.logsumexp(dim=1, keepdim=True)
        if tokens.shape[1] < logits.shape[1]
        else logs.new_full((len(logs), 1), -1e4)
    )
    return torch.cat([logs.gather(1, tokens), rest], dim=1)
