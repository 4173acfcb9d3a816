"""From examples to sequences of token ids, with the loss on what the model should answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from offsite.emulator.examples import Fault, LeftOut, OddRows
from offsite.emulator.examples.census import Counter
from offsite.emulator.modality.base import Encoding
from offsite.emulator.modality.causal_text import chat
from offsite.emulator.modality.causal_text.shapes import TextExample

IGNORED = -100  # the label of a position that carries no loss


@dataclass(frozen=True)
class Tokens:
    """One sequence as token ids and their labels, of equal length."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    modality: ClassVar[str] = "causal-text"

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.input_ids)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens without a label."""
        return tuple(one for one, label in zip(self.input_ids, self.labels, strict=True) if label == IGNORED)


def encode(
    examples: Sequence[TextExample], tokenizer: Any, *, max_length: int, divide: bool, odd_rows: OddRows
) -> Encoding:
    """Encode examples as sequences of at most `max_length` tokens.

    A text that is longer becomes several sequences, or its beginning alone if it is not to be divided. A prompt with
    its completion and a conversation are cut on the right, and dropped where that leaves nothing to learn. What the
    tokenizer's chat template does not take is left out, unless odd rows are to be refused. Raises ValueError then, and
    if nothing is left.
    """
    start = _start(tokenizer)
    useful: list[Tokens] = []
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
            cut += len(one) > max_length
            short = Tokens(one.input_ids[:max_length], one.labels[:max_length])
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
    counts = {
        "sequences": len(useful),
        "divided": divided,  # texts longer than a sequence, which became several
        "cut": cut,  # sequences that lose their end
        "without_target": without_target,  # of these: they lose all that is to be learned, and are dropped
        "left_out": sum(one.count for one in left_out),  # what the tokenizer's chat template does not take
    }
    return Encoding(useful, counts, _warnings(counts, left_out))


def opening(example: TextExample, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that a model is given of an example before the first that it is to write; raises Fault."""
    one = _sequences(example, tokenizer, _start(tokenizer))[0]
    return one.input_ids[: next(at for at, label in enumerate(one.labels) if label != IGNORED)]


def _start(tokenizer: Any) -> list[int]:
    """Return the token of its own with which a tokenizer starts every text, as it shows on an empty one."""
    return [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []


def _warnings(counts: dict[str, int], left_out: Sequence[LeftOut]) -> list[str]:
    warnings = [f"left out {one.count:,} {one.reason}; first {one.first}" for one in left_out]
    if dropped := counts["without_target"]:
        warnings.append(
            f"{dropped:,} of {dropped + counts['sequences']:,} sequences have nothing to learn within max_length and "
            "are dropped: their prompts are too long"
        )
    return warnings


def _sequences(example: TextExample, tokenizer: Any, start: list[int]) -> list[Tokens]:
    if tokenizer.chat_template and (example.prompt or example.messages):
        return [
            _encoded(one, tokenizer, []) for one in chat.pieces(example, tokenizer)
        ]  # it writes its own first token
    if example.messages:
        return [_encoded(chat.untemplated(example.messages), tokenizer, start)]
    return [_encoded([(example.prompt, False), (example.completion, True)], tokenizer, start)]


def _encoded(pieces: chat.Pieces, tokenizer: Any, start: list[int]) -> Tokens:
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
    return Tokens(tuple(ids), tuple(labels))


def _divided(text: Tokens, start: list[int], max_length: int) -> list[Tokens]:
    """Cut a text that is longer than a sequence into several, each begun as the tokenizer begins a text."""
    size = max_length - len(start)
    if len(text) <= max_length or size < 1:
        return [text]
    body = text.input_ids[len(start) :]
    cuts = [body[at : at + size] for at in range(0, len(body), size)]
    if len(cuts[-1]) == 1:  # one token after nothing teaches nothing
        cuts.pop()
    return [Tokens((*start, *one), (*[IGNORED] * len(start), *one)) for one in cuts]
