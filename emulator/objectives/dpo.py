"""Direct preference optimisation: of two answers the chosen one becomes likelier than the rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from offsite.emulator import modality
from offsite.emulator.examples import OddRows
from offsite.emulator.examples.fault import Fault, strange_columns
from offsite.emulator.modality.base import Batch, Encoding, Modality
from offsite.emulator.objectives.answers import EQUAL, Answers, check_beta, encode, refer, resting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from offsite.emulator.objectives.comparison import Pairs

SHAPES = '{"prompt", "chosen", "rejected"}, texts or lists of turns, or {"chosen", "rejected"} as whole conversations'


@dataclass(frozen=True)
class Dpo:
    """-log sigmoid(beta ((log p_w - log ref_w) - (log p_l - log ref_l))) of a pair (Rafailov et al., arXiv 2305.18290).

    The reference is the emulator with the adapter that changes nothing.
    """

    beta: float = 0.1

    name: ClassVar[str] = "dpo"
    paper: ClassVar[str] = "arXiv 2305.18290"
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        check_beta(self.beta)

    def reader(self, kind: Modality) -> PairReader:
        """Return what reads pairs."""
        return PairReader(kind)

    def encode(
        self, kind: Modality, examples: Sequence[Answers], tokenizer: Any, *, max_length: int, odd_rows: OddRows
    ) -> Encoding:
        """Encode pairs, each answer cut at `max_length`; a pair of which one has nothing to learn left is dropped."""
        return encode(kind, examples, tokenizer, max_length=max_length, odd_rows=odd_rows)

    def refer(self, model: nn.Module, samples: Sequence[Any], *, batch_size: int) -> list[Any]:
        """Return pairs with the log-likelihoods of their answers."""
        return refer(model, samples, batch_size=batch_size, objective=self.name)

    def collate(self, samples: Sequence[Any]) -> Pairs:
        """Make a batch of pairs."""
        from offsite.emulator.objectives.comparison import Pairs

        return Pairs.of(samples)

    def text(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of the chosen answers."""
        return modality.collate([one.own for one in samples])

    def common(self, model: nn.Module, batch: Pairs) -> None:
        """Nothing: each pair stands for itself."""

    def loss(self, model: nn.Module, batch: Pairs, common: float = 0.0) -> Tensor:
        """Return the mean over pairs, in nats."""
        from torch.nn import functional

        gains = batch.gains(model)  # (n, 2)
        return -functional.logsigmoid(self.beta * (gains[:, 0] - gains[:, 1])).mean()


class PairReader:
    """Reads rows of two answers."""

    shapes: ClassVar[str] = SHAPES

    def __init__(self, kind: Modality) -> None:
        self._kind = kind
        self.columns = (*kind.columns, "chosen", "rejected")

    def example(self, row: dict[str, Any], place: str) -> Answers:
        """Make an example of a row; raises Fault."""
        cells = {name: row[name] for name in self.columns if row.get(name) is not None}
        answers = [cells.pop(name, None) for name in ("chosen", "rejected")]
        if None in answers:
            raise strange_columns(row, f"for the objective {Dpo.name} {SHAPES}")
        prompt = cells.pop("prompt", None)
        if prompt is None:
            prompt, answers = _common(answers, row)
        if answers[0] == answers[1]:
            raise Fault(EQUAL, "'chosen' and 'rejected' are the same; there is nothing to learn from them")
        rest = resting(cells)
        both = [self._answer({**rest, "prompt": prompt, "completion": answer}, place) for answer in answers]
        own = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        return Answers({**rest, **own}, tuple(both), place=place)

    def _answer(self, cells: dict[str, Any], place: str) -> Any:
        """Read one answer as the completion that it is to the modality."""
        try:
            return self._kind.example(cells, place)
        except Fault as fault:
            raise Fault(fault.reason, f"of 'chosen' and 'rejected', each a completion: {fault}") from None


def _common(answers: list[Any], row: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Part two conversations into the turns that they begin with and those that differ; raises Fault."""
    if not all(isinstance(answer, list) for answer in answers):
        raise strange_columns(row, f"for the objective {Dpo.name} {SHAPES}")
    chosen, rejected = answers
    shared = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    if not shared:
        raise Fault(EQUAL, "'chosen' and 'rejected' are conversations that do not begin with the same question")
    return chosen[:shared], [chosen[shared:], rejected[shared:]]
