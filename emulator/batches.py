"""From examples to batches of token ids, with the loss on what the model should answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from offsite.emulator.examples import Example
from offsite.emulator.seeds import generator

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


def encode(examples: Sequence[Example], tokenizer: Any, *, max_length: int) -> list[Encoded]:
    """Encode examples, cut on the right to `max_length` tokens; those left without a target are dropped.

    Raises ValueError if all are dropped, or if the tokenizer's chat template refuses or rewrites turns.
    """
    # A tokenizer that starts every text with a token of its own shows it on an empty text.
    start = [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []
    encoded = [_encode(example, tokenizer, start, max_length) for example in examples]
    useful = [one for one in encoded if any(label != IGNORED for label in one.labels[1:])]
    if not useful:
        raise ValueError(
            f"none of the {len(examples)} examples has a token to learn within its first {max_length} tokens; "
            "allow longer sequences or shorten the prompts"
        )
    return useful


def _encode(example: Example, tokenizer: Any, start: list[int], max_length: int) -> Encoded:
    pieces = _pieces(example, tokenizer)
    ids = [] if _has_turns(example, tokenizer) else list(start)  # a chat template writes its own first token
    labels = [IGNORED] * len(ids)
    for text, learned in pieces:
        # Piece by piece, because when the model is used the prompt is tokenised before the answer exists.
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    end = tokenizer.eos_token
    if end and not pieces[-1][0].rstrip().endswith(end):
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id if pieces[-1][1] else IGNORED)
    return Encoded(tuple(ids[:max_length]), tuple(labels[:max_length]))


def _has_turns(example: Example, tokenizer: Any) -> bool:
    return bool(tokenizer.chat_template) and bool(example.prompt or example.messages)


def _pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Cut an example into stretches of text, each with whether it is to be learned."""
    if _has_turns(example, tokenizer):
        return _templated(example, tokenizer)
    if example.messages:
        pieces = []
        for turn in example.messages:
            pieces += [(f"{turn['role']}: ", False), (f"{turn['content']}\n", turn["role"] == "assistant")]
        return pieces
    return [(example.prompt, False), (example.completion, True)]


def _templated(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Render the conversation once and find the assistant's turns in it by rendering its beginnings."""
    turns = list(example.messages) or [
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.completion},
    ]

    def render(count: int, *, asked: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=asked))
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns[:count])
            raise ValueError(f"the tokenizer's chat template refuses turns of {roles}: {error}") from None

    whole = render(len(turns))
    pieces: list[tuple[str, bool]] = []
    done = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = render(index, asked=True), render(index + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"the tokenizer's chat template renders turn {index + 1} of a conversation differently once more turns "
                "follow, so the answer cannot be told from the rest; give such data as 'prompt' and 'completion'"
            )
        pieces += [(whole[done : len(before)], False), (after[len(before) :], True)]
        done = len(after)
    return [*pieces, (whole[done:], False)] if done < len(whole) else pieces


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
