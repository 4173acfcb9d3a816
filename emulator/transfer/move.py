"""The steps of a move: write, answer, select, learn. At most two models are in memory at a time."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from offsite.emulator import modality, placements, plug, zoo
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.modality.causal_text.encoding import opening
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.routing import Telling
from offsite.emulator.transfer.answers import divergence, same_words
from offsite.emulator.transfer.discrimination import best, check_share, gains, realness
from offsite.emulator.transfer.sampling import alike, continuations
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.emulator.tuning.rates import suited

MARGIN = 8  # tokens that a text may have more than the longest example

Row = dict[str, str]
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Move:
    """How an adapter is moved."""

    texts: int = 128  # that the new base writes
    shots: int = 5  # public examples that it is shown before each
    share: float = 0.5  # of the texts, that the old base's adapter changes most, are learned
    temperature: float = 1.0  # at which texts are drawn; answers are the likeliest
    steps: int = 60
    batch_size: int = 4
    learning_rate: float | None = None  # None: what suits the method and the model
    max_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what would be said late: models are loaded, and texts written, before it counts."""
        check_share(self.share)
        if self.texts < 1 or self.shots < 1:
            raise ValueError(f"texts and shots must be at least 1, got {self.texts} and {self.shots}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")


class Figures(NamedTuple):
    """Perplexities on held-out examples, before and after."""

    old_base: float
    old_tuned: float
    new_base: float
    new_tuned: float

    @property
    def recovered(self) -> float:
        """The share of the old adapter's gain, in nats, that the new base has; NaN where that gained nothing."""
        log = [torch.tensor(figure, dtype=torch.float64).log() for figure in self]
        return float((log[2] - log[3]) / (log[0] - log[1])) if self.old_tuned < self.old_base else float("nan")


class Moved(NamedTuple):
    """An adapter of the new base, and what it was learned from."""

    adapter: Adapter
    rows: list[Row]
    written: int  # texts of which the rows were selected
    figures: Figures | None


def move(
    old: Path,
    adapter: Path,
    new: Path,
    seeds: Sequence[Any],
    how: Move,
    *,
    method: Method,
    placement: placements.Placement,
    measured: tuple[Telling, Adapter] | None = None,
    held_out: Sequence[Any] = (),
    tell: Tell = lambda what, step, steps: None,
) -> Moved:
    """Move a published adapter of an old base to a new one; `seeds` are public examples of the task.

    `measured` is a method that tells rows by themselves, and the sums of the task's rows. Raises ValueError for an
    adapter, sums or layers that do not fit, and where no text was written.
    """
    tell("the new base writes texts", 0, 1)
    prompts = [one.prompt or _asked(one) for one in seeds]
    asks = all(prompts)
    texts = _written(new, prompts if asks else [one.completion for one in seeds], how)

    tell("the old base answers", 0, 1)
    base, words = zoo.load_base(old, dtype="auto")
    teacher = plug.load(zoo.load_base(old, dtype="auto")[0], adapter)
    answers = _encoded(_answered(teacher, words, texts, how) if asks else [{"text": one} for one in texts], words, how)
    samples = [sample for _, sample in answers]
    scores = realness(*measured, samples) if measured else gains(teacher, base, samples)
    rows = [row for row, _ in best(answers, scores, share=how.share)]
    before = [_perplexity(model, held_out, words, how) for model in (base, teacher) if held_out]
    del base

    student, its = zoo.load_base(new, dtype="auto")
    figures = [*before, *(_perplexity(student, held_out, its, how) for _ in before[:1])]
    depth = len(layers(student))
    places = {layer: layer for layer in placement.choose(range(depth), depth)}
    method.fits(student, places)
    schedule = Schedule(
        how.steps,
        how.learning_rate or suited(method.rate, student),
        batch_size=how.batch_size,
        decay="cosine",
        seed=how.seed,
    )
    student = method.attach(student, places, method.start(student, places, seed=how.seed))
    tune(
        student,
        method.named_parameters(student, places),
        [sample for _, sample in _encoded(rows, its, how)],
        schedule,
        loss=divergence(teacher) if same_words(words, its) else modality.loss,
        tell=lambda step, of, loss: tell(f"the new base learns (loss {loss:.2f})", step, of),
    )
    figures += [_perplexity(student, held_out, its, how) for _ in before[:1]]
    return Moved(method.state(student, places), rows, len(texts), Figures(*figures) if figures else None)


def _asked(example: Any) -> str:
    """Return what a conversation begins with; empty if an example is a text."""
    return next((turn["content"] for turn in example.messages if turn["role"] == "user"), "")


def _written(new: Path, examples: Sequence[str], how: Move) -> list[str]:
    """Return texts that the new base writes like some examples, hardly longer than the longest."""
    model, tokenizer = zoo.load_base(new, dtype="auto")
    most = min(how.max_length, MARGIN + max(len(tokenizer(text).input_ids) for text in examples))

    def write(lists: Sequence[str], seed: int) -> list[str]:
        given = [tokenizer(text).input_ids for text in lists]
        return continuations(model, tokenizer, given, most=most, temperature=how.temperature, seed=seed)

    return alike(write, examples, count=how.texts, shots=how.shots, seed=how.seed)


def _answered(teacher: nn.Module, tokenizer: Any, prompts: Sequence[str], how: Move) -> list[Row]:
    given = [opening(TextExample(prompt, "."), tokenizer) for prompt in prompts]
    answers = continuations(teacher, tokenizer, given, most=how.max_length // 2)
    return [{"prompt": prompt, "completion": one} for prompt, one in zip(prompts, answers, strict=True) if one.strip()]


def _encoded(rows: Sequence[Row], tokenizer: Any, how: Move) -> list[tuple[Row, Any]]:
    """Return rows with what a model takes of them; raises ValueError if it takes nothing of any."""
    pairs: list[tuple[Row, Any]] = []
    for row in rows:
        example = TextExample(row.get("prompt", ""), row.get("completion", row.get("text", "")))
        with suppress(ValueError):
            pairs += [(row, sample) for sample in _samples([example], tokenizer, how)]
    if not pairs:
        raise ValueError(f"none of the {len(rows)} texts that were written has anything to learn; give other examples")
    return pairs


def _samples(examples: Sequence[Any], tokenizer: Any, how: Move) -> list[Any]:
    return modality.encode(examples, tokenizer, max_length=how.max_length, divide=False)


def _perplexity(model: nn.Module, examples: Sequence[Any], tokenizer: Any, how: Move) -> float:
    return modality.score(model, evaluation_batches(_samples(examples, tokenizer, how), batch_size=8)).perplexity
