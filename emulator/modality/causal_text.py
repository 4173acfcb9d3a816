"""Text of which each token is predicted from those before it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.batches import IGNORED, Batch
from offsite.emulator.modality.base import Score


@dataclass(frozen=True)
class CausalText:
    """Its batches are `batches.Batch`, its outputs logits (b, t, v), and its targets the tokens with a label."""

    name: ClassVar[str] = "causal-text"
    metric: ClassVar[str] = "nll"

    def run(self, model: nn.Module, batch: Batch, *, keep: Tensor | None = None) -> Tensor:
        """Return the logits, of the positions `keep` alone if they are given."""
        kept = {} if keep is None else {"logits_to_keep": keep}
        logits: Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **kept, use_cache=False
        ).logits
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood of a target token, in nats."""
        return self._nll(model, batch, reduction="mean")

    def score(self, model: nn.Module, batch: Batch) -> Score:
        """Return the negative log-likelihood of the target tokens, in nats."""
        return Score(float(self._nll(model, batch, reduction="sum")), batch.targets, self.metric)

    def _nll(self, model: nn.Module, batch: Batch, *, reduction: str) -> Tensor:
        """Ask for logits only where some row has a target."""
        targets = batch.labels[:, 1:]
        columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        if not len(columns):
            raise ValueError("the batch has no token to predict")
        rows = self.run(model, batch, keep=columns).flatten(0, 1).float()
        return functional.cross_entropy(rows, targets[:, columns].flatten(), ignore_index=IGNORED, reduction=reduction)
