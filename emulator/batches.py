"""From examples to batches of token ids, with the loss on what the model should answer."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from offsite.emulator import chat
from offsite.emulator.examples import Example, Fault, LeftOut
from offsite.emulator.examples.census import Counter
from offsite.emulator.seeds import generator

log = logging.getLogger(__name__)
IGNORED = -100  # the label of a position that carries no loss


@dataclass(frozen=True)
class Encoded:
    """One example as token ids and their labels, of equal length."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids, attention mask and labels, each (b, t) int64, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    modality: ClassVar[str] = "causal-text"

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted; the first of a sequence never is."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def last(self) -> Tensor:
        """Index (1,) of the last position, for forward passes whose logits nobody reads.

        The number 1 as `logits_to_keep` would give the head a strided view, and with it a copy of its matrix a row.
        """
        return self.input_ids.new_tensor([self.input_ids.shape[1] - 1])

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Encoding:
    """Sequences to learn from, and what became of the examples on the way."""

    sequences: list[Encoded]
    examples: int
    divided: int  # texts longer than a sequence, which became several
    cut: int  # sequences that lose their end
    without_target: int  # of these: they lose all that is to be learned, and are dropped
    left_out: tuple[LeftOut, ...]  # what the tokenizer's chat template does not take

    @property
    def counts(self) -> dict[str, int]:
        """The numbers alone, without a word of the data."""
        return {
            "sequences": len(self.sequences),
            "divided": self.divided,
            "cut": self.cut,
            "without_target": self.without_target,
            "left_out": sum(one.count for one in self.left_out),
        }

    @property
    def warnings(self) -> list[str]:
        """What the data's owner should know, in sentences."""
        told = [f"left out {one.count:,} {one.reason}; first {one.first}" for one in self.left_out]
        if self.without_target:
            of = self.without_target + len(self.sequences)
            told.append(
                f"{self.without_target:,} of {of:,} sequences have nothing to learn within max_length and are dropped: "
                "their prompts are too long"
            )
        return told


def encode(examples: Sequence[Example], tokenizer: Any, *, max_length: int, divide: bool = True) -> list[Encoded]:
    """Encode examples of which none may be odd; see `encoded`. A warning is logged if some lose all there is to learn.

    Raises ValueError at the first whose turns the tokenizer's chat template refuses, or if nothing is left to learn.
    """
    outcome = encoded(examples, tokenizer, max_length=max_length, divide=divide, odd_rows="refuse")
    for warning in outcome.warnings:
        log.warning(warning)
    return outcome.sequences


def encoded(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    divide: bool = True,
    odd_rows: Literal["skip", "refuse"] = "skip",
) -> Encoding:
    """Encode examples as sequences of at most `max_length` tokens.

    A text that is longer becomes several sequences, or its beginning alone if it is not to be divided. A prompt with
    its completion and a conversation are cut on the right, and dropped where that leaves nothing to learn. What the
    tokenizer's chat template does not take is left out, unless odd rows are to be refused. Raises ValueError then, and
    if nothing is left.
    """
    # A tokenizer that starts every text with a token of its own shows it on an empty text.
    start = [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []
    useful: list[Encoded] = []
    counter = Counter()
    divided = cut = without_target = 0
    for example in examples:
        try:
            sequences = _sequences(example, tokenizer, start)
        except Fault as fault:
            if odd_rows == "refuse":
                raise (fault.at(example.place) if example.place else fault) from None
            counter.leave_out(fault.at(example.place))
            continue
        if divide and not example.prompt and not example.messages:
            (text,) = sequences
            sequences = _divided(text, start, max_length)
            divided += len(sequences) > 1
        for one in sequences:
            cut += len(one.input_ids) > max_length
            short = Encoded(one.input_ids[:max_length], one.labels[:max_length])
            if any(label != IGNORED for label in short.labels[1:]):
                useful.append(short)
            else:
                without_target += 1
    left_out = counter.census.left_out
    if not useful:
        first = f"; {left_out[0].first}" if left_out else ""
        raise ValueError(
            f"none of the {len(examples)} examples has a token to learn within its first {max_length} tokens; "
            f"allow longer sequences or shorten the prompts{first}"
        )
    return Encoding(useful, len(examples), divided, cut, without_target, left_out)


def _sequences(example: Example, tokenizer: Any, start: list[int]) -> list[Encoded]:
    if tokenizer.chat_template and (example.prompt or example.messages):
        return [
            _encoded(one, tokenizer, []) for one in chat.pieces(example, tokenizer)
        ]  # it writes its own first token
    if example.messages:
        return [_encoded(chat.untemplated(example.messages), tokenizer, start)]
    return [_encoded([(example.prompt, False), (example.completion, True)], tokenizer, start)]


def _encoded(pieces: chat.Pieces, tokenizer: Any, start: list[int]) -> Encoded:
    ids, labels = list(start), [IGNORED] * len(start)
    for text, learned in pieces:
        # Piece by piece, because when the model is used the prompt is tokenised before the answer exists.
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    end = tokenizer.eos_token
    if end and not pieces[-1][0].rstrip().endswith(end):
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id if pieces[-1][1] else IGNORED)
    return Encoded(tuple(ids), tuple(labels))


def _divided(text: Encoded, start: list[int], max_length: int) -> list[Encoded]:
    """Cut a text that is longer than a sequence into several, each begun as the tokenizer begins a text."""
    size = max_length - len(start)
    if len(text.input_ids) <= max_length or size < 1:
        return [text]
    body = text.input_ids[len(start) :]
    cuts = [body[at : at + size] for at in range(0, len(body), size)]
    if len(cuts[-1]) == 1:  # one token after nothing teaches nothing
        cuts.pop()
    return [Encoded((*start, *one), (*[IGNORED] * len(start), *one)) for one in cuts]


def schedule(count: int, *, batch_size: int, steps: int, first_step: int, seed: int) -> list[list[int]]:
    """Return which of `count` examples each step sees: a cut of one endless sequence of seeded permutations."""
    orders: dict[int, list[int]] = {}

    def at(place: int) -> int:
        epoch, offset = divmod(place, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=generator(seed, f"epoch {epoch}")).tolist()
        return orders[epoch][offset]

    return [
        [at(step * batch_size + row) for row in range(batch_size)] for step in range(first_step, first_step + steps)
    ]


def collate(encoded: Sequence[Encoded]) -> Batch:
    """Pad examples on the right to the longest of them."""
    length = max(len(one.input_ids) for one in encoded)

    def padded(rows: list[tuple[int, ...]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)

    ids = [one.input_ids for one in encoded]
    mask = [(1,) * len(row) for row in ids]
    return Batch(padded(ids, 0), padded(mask, 0), padded([one.labels for one in encoded], IGNORED))


def longest(batches: Iterable[Batch], count: int) -> list[Batch]:
    """Return the longest examples of batches in batches of their own: the same however they were cut before."""
    rows = [
        Encoded(tuple(ids[:length].tolist()), tuple(labels[:length].tolist()))
        for batch in batches
        for ids, labels, length in zip(batch.input_ids, batch.labels, batch.attention_mask.sum(dim=1), strict=True)
    ]
    return evaluation_batches(sorted(rows, key=lambda row: len(row.input_ids))[-count:], batch_size=count)


def training_batches(
    encoded: Sequence[Encoded], *, batch_size: int, steps: int, first_step: int, seed: int
) -> Iterator[Batch]:
    """Yield the batches of steps `first_step` .. `first_step + steps - 1` of the endless seeded sequence."""
    for rows in schedule(len(encoded), batch_size=batch_size, steps=steps, first_step=first_step, seed=seed):
        yield collate([encoded[row] for row in rows])


def evaluation_batches(encoded: Sequence[Encoded], *, batch_size: int) -> list[Batch]:
    """Cut examples into batches in order of their length, to pad little."""
    ordered = sorted(encoded, key=lambda one: len(one.input_ids))
    return [collate(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]
