"""Text of which each token is predicted from those before it. Tensor libraries are loaded where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from offsite.emulator.examples import OddRows
from offsite.emulator.modality.base import Encoding, Piece, Score
from offsite.emulator.modality.causal_text import encoding, shapes
from offsite.emulator.modality.causal_text.encoding import Tokens
from offsite.emulator.modality.causal_text.shapes import TextExample

if TYPE_CHECKING:
    from torch import Tensor, nn

    from offsite.emulator.modality.causal_text.batch import TokenBatch


@dataclass(frozen=True)
class CausalText:
    """Its outputs are logits (b, t, v), and its targets the tokens with a label."""

    name: ClassVar[str] = "causal-text"
    metric: ClassVar[str] = "nll"
    columns: ClassVar[tuple[str, ...]] = shapes.COLUMNS
    shapes: ClassVar[str] = shapes.SHAPES

    def example(self, row: dict[str, Any], place: str) -> TextExample:
        """Make an example of the columns of a row that are not null; raises Fault."""
        return shapes.example(row, place)

    def encode(
        self,
        examples: Sequence[TextExample],
        tokenizer: Any,
        *,
        max_length: int,
        divide: bool = True,
        odd_rows: OddRows,
    ) -> Encoding:
        """Encode examples as sequences of at most `max_length` tokens; raises ValueError."""
        return encoding.encode(examples, tokenizer, max_length=max_length, divide=divide, odd_rows=odd_rows)

    def collate(self, samples: Sequence[Tokens]) -> TokenBatch:
        """Pad sequences on the right to the longest of them."""
        from offsite.emulator.modality.causal_text import batch

        return batch.collate(samples)

    def probe(self, model: nn.Module, *, rows: int, length: int) -> TokenBatch:
        """Return random tokens, as many as the model has positions for."""
        from offsite.emulator.modality.causal_text import batch

        return batch.probe(model, rows=rows, length=length)

    def disturb(self, model: nn.Module, batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
        """Return the batch with every other word replaced, and a mask of the words after these."""
        return batch.disturbed(model)

    def run(self, model: nn.Module, batch: TokenBatch, *, keep: Tensor | None = None) -> Tensor:
        """Return the logits, of the positions `keep` alone if they are given."""
        kept = {} if keep is None else {"logits_to_keep": keep}
        logits: Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **kept, use_cache=False
        ).logits
        return logits

    def loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return the mean negative log-likelihood of a target token, in nats."""
        return self._nll(model, batch, reduction="mean")

    def likelihoods(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return (b,) log-likelihoods of each sequence's target tokens, in nats."""
        losses = self._nll(model, batch, reduction="none")
        if batch.packing:
            rows = (batch.labels[:, 1:] != encoding.IGNORED).nonzero()[:, 0]
            return -losses.new_zeros(len(batch.labels)).index_add(0, rows, losses)
        return -losses.view(len(batch.labels), -1).sum(dim=1)

    def pieces(self, batch: TokenBatch) -> list[list[Piece]]:
        """Cut each sequence between what has a label and what has none."""
        return [
            [
                (tuple(token for token, _ in part), learned)
                for learned, part in groupby(
                    zip(one.input_ids, one.labels, strict=True), key=lambda pair: pair[1] != encoding.IGNORED
                )
            ]
            for one in batch.samples
        ]

    def words(self, batch: TokenBatch) -> list[tuple[int, ...]]:
        """Return the tokens of each sequence without a label; all of it if at most one has none, as in a plain text."""
        return [prompt if len(prompt := one.prompt) > 1 else one.input_ids for one in batch.samples]

    def score(self, model: nn.Module, batch: TokenBatch) -> Score:
        """Return the negative log-likelihood of the target tokens, in nats."""
        return Score(float(self._nll(model, batch, reduction="sum")), batch.targets, self.metric)

    def predictions(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return (n, v) logits of the target tokens, sequence by sequence."""
        if batch.packing:
            from offsite.emulator.modality.causal_text import packing

            return packing.logits(model, batch).float()
        targets = batch.labels[:, 1:] != encoding.IGNORED
        columns = targets.any(dim=0).nonzero().squeeze(1)
        return self.run(model, batch, keep=columns)[targets[:, columns]].float()

    def packs(self, model: nn.Module) -> bool:
        """Try it."""
        from offsite.emulator.modality.causal_text import packing

        return packing.holds(model)

    def _nll(self, model: nn.Module, batch: TokenBatch, *, reduction: str) -> Tensor:
        """Ask for logits only where some row has a target."""
        from torch.nn import functional

        targets = batch.labels[:, 1:]
        columns = (targets != encoding.IGNORED).any(dim=0).nonzero().squeeze(1)
        if not len(columns):
            raise ValueError("the batch has no token to predict")
        if batch.packing:
            labels = targets[targets != encoding.IGNORED]
            return functional.cross_entropy(self.predictions(model, batch), labels, reduction=reduction)
        rows = self.run(model, batch, keep=columns).flatten(0, 1).float()
        labels = targets[:, columns].flatten()
        return functional.cross_entropy(rows, labels, ignore_index=encoding.IGNORED, reduction=reduction)
