"""Signatures of tasks: how often n-grams of the tokens of instructions occur, hashed, and in how many of the rows.

Of their sums TF-IDF is formed, by whose cosine a task is told from another, as instruction codebooks do (Large
Continual Instruction Assistant, arXiv 2410.10868). There sites would have to show instructions; here they send counts.
What is counted of a row are the tokens that it does not learn, its prompt, and all of them where it has no prompt.

A count says that its n-gram occurs, to whoever knows the salt and has a text to ask about: the owner, who writes the
run, and all its sites. Few rows leak more than many: the counts of one row are that row's words. The salt keeps others
from asking. Runs whose sums are to be compared need one salt. Neither sites nor owners allow this method unless they
say so, and sites may ask for noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.methods.base import Adapter, Formula
from offsite.emulator.methods.tallied import Forward, Parts, Tallied
from offsite.emulator.modality import Batch
from offsite.kernels import signatures
from offsite.kernels.cosines import cosines


@dataclass(frozen=True)
class Signature(Tallied):
    """Measure "0.signature.terms" (buckets,), ".documents" (buckets,), the rows that have one, and ".count" (1,)."""

    ngram: int = 2  # the longest, in tokens
    buckets: int = 4096
    salt: str = ""

    name: ClassVar[str] = "signature"
    asks_model: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2410.10868"
    formula: ClassVar[Formula] = Formula("layer", "0", once="2 * buckets + 1")

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.ngram <= 8:
            raise ValueError(f"ngram must be from 1 to 8, got {self.ngram}")
        if not 16 <= self.buckets <= 2**20:
            raise ValueError(f"buckets must be from 16 to {2**20:,}, got {self.buckets}")
        if len(self.salt.encode()) > 64:
            raise ValueError(f"salt must be at most 64 bytes, got {len(self.salt.encode())}")

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """See `Tallied.sizes`."""
        return {"terms": (self.buckets,), "documents": (self.buckets,), "count": (1,)}

    @property
    def gives(self) -> str:
        """See `methods.base.Measuring`."""
        return "terms"

    def tally(
        self, model: nn.Module, places: Mapping[int, int], batch: Batch, forward: Forward
    ) -> tuple[Parts, Tensor]:
        """Count the terms of each row; raises ValueError where rows are no words."""
        return self.counts(batch), forward(model, batch)

    def counts(self, batch: Batch) -> Parts:
        """Return what each row of a batch gives, without a model; raises ValueError where rows are no words."""
        terms = signatures.counts(
            modality.words(batch), ngram=self.ngram, buckets=self.buckets, salt=self.salt.encode()
        )
        return {"terms": terms, "documents": (terms > 0).double(), "count": torch.ones(len(terms), 1).double()}

    def rows(self, model: nn.Module, places: Mapping[int, int], batch: Batch) -> Parts:
        """See `Tallied.rows`; the model is not asked."""
        return self.counts(batch)

    def likeness(self, rows: Mapping[str, Tensor], known: Mapping[str, Adapter]) -> Tensor:
        """Return cosines of TF-IDF; how rare a term is, the known tasks' rows say together."""
        books = [self.parts(adapter) for adapter in known.values()]
        documents = torch.stack([book["documents"] for book in books]).sum(dim=0)
        count = torch.stack([book["count"] for book in books]).sum(dim=0)
        terms = torch.stack([book["terms"] for book in books])
        return cosines(signatures.tf_idf(rows["terms"], documents, count), signatures.tf_idf(terms, documents, count))
