"""What answers: one forward pass after another over all that is asked, whichever adapters that is of.

Who asks joins between two passes, and leaves as soon as the answer ends (Orca's iteration-level scheduling, OSDI 2022).
Answers that several adapters give together are as many rows, of which each goes on with the same token.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from offsite.emulator.ensemble import together
from offsite.emulator.serving import rows as batch
from offsite.emulator.serving.slots import BASE, Slots

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """The next token of an answer. `end` says of the last why there are no more; "stop" has none that is text."""

    token: int
    end: Literal["", "stop", "length"] = ""


@dataclass(eq=False)
class Request:
    """What is to be answered.

    Args:
        prompt: its tokens, at least one.
        folders: of the adapters that answer together; none for the base.
        most: tokens of an answer.
        tell: is given each piece, or why there is none, in the engine's thread.
        temperature: at which tokens are drawn; 0: the likeliest.
        top_p: how much of the probability is drawn from.
        seed: of what is drawn; who else is answered changes sums in the last digits, and so, seldom, what is drawn.
    """

    prompt: Sequence[int]
    folders: tuple[Path, ...]
    most: int
    tell: Callable[[Piece | Exception], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    over: bool = False  # also by whoever asked and wants no more
    slots: tuple[int, ...] = field(default=(), init=False)
    tokens: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._drawn = torch.Generator()
        if self.seed is None:
            self._drawn.seed()
        else:
            self._drawn.manual_seed(self.seed)

    @property
    def width(self) -> int:
        """How many rows of a batch it takes."""
        return max(1, len(self.folders))

    def take(self, logits: Tensor, ends: frozenset[int]) -> None:
        """Choose the next token by the logits (width, v) of its rows, and tell it."""
        scores = (logits if len(logits) == 1 else together(one[None] for one in logits)).cpu()
        if self.temperature:
            for warp in (TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)):
                scores = warp(None, scores)  # neither looks at what came before
            token = int(scores.softmax(-1).multinomial(1, generator=self._drawn))
        else:
            token = int(scores.argmax())
        self.tokens.append(token)
        end: Literal["", "stop", "length"] = "length" if len(self.tokens) == self.most else ""
        end = "stop" if token in ends else end
        self.over = self.over or bool(end)
        self.tell(Piece(token, end))


class Busy(Exception):
    """As many requests wait as may; it is worth asking again."""


class Engine:
    """Answers requests with a base and its slots; `run` is for a thread of its own."""

    def __init__(self, model: Any, slots: Slots, *, ends: frozenset[int], rows: int = 16, waiting: int = 64) -> None:
        """Take a model in evaluation mode, and the tokens that end an answer.

        `rows` are how many sequences one pass has at most, `waiting` how many requests may wait for that.
        """
        self._model, self._slots, self._ends = model, slots, ends
        self._most, self._longest = rows, waiting
        self._waiting: deque[Request] = deque()
        self._live: list[Request] = []
        self._rows: batch.Rows | None = None
        self._news, self._closed = threading.Condition(), False
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.context = int(positions) if positions else 1 << 20

    def submit(self, request: Request) -> None:
        """Have a request answered; raises Busy, and ValueError for one that never could be."""
        if not request.prompt:
            raise ValueError("the prompt has no token")
        if len(request.prompt) + request.most > self.context:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens, and an answer of up to {request.most} goes beyond the "
                f"{self.context} that the model has places for"
            )
        if request.width > self._most or len(request.folders) > self._slots.count:
            raise ValueError(f"{request.width} adapters that answer together are more than one batch or memory takes")
        with self._news:
            if len(self._waiting) >= self._longest:
                raise Busy(f"{len(self._waiting)} requests are waiting")
            self._waiting.append(request)
            self._news.notify()

    def run(self) -> None:
        """Answer until it is closed."""
        while not self._closed:
            if not self.step():
                with self._news:
                    self._news.wait_for(lambda: self._waiting or self._closed)

    def close(self) -> None:
        """End `run` after the pass that is under way."""
        with self._news:
            self._closed = True
            self._news.notify()

    @torch.inference_mode()
    def step(self) -> bool:
        """Go on with all that is live, and begin what is waiting; return whether there may be more to do."""
        try:
            self._leave()
            if self._rows:
                self._use(self._live)
                last = [one.tokens[-1] for one in self._live for _ in range(one.width)]
                self._take(self._live, batch.advance(self._model, self._rows, last))
            if new := self._admit():
                self._live += new
                self._use(new)
                prompts = [one.prompt for one in new for _ in range(one.width)]
                logits, rows = batch.begin(self._model, prompts)
                self._rows = batch.join(self._rows, rows) if self._rows else rows
                self._take(new, logits)
        except Exception as error:  # of whatever library computes: who asked is told, and the next ones are answered
            log.exception("a pass for %d requests failed", len(self._live))
            for request in self._live:
                request.tell(error)
            self._live, self._rows = [], None
        return bool(self._live or self._waiting)

    def _use(self, requests: Sequence[Request]) -> None:
        self._slots.use([slot for one in requests for slot in one.slots or (BASE,)])

    def _take(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Give each request the logits of its rows."""
        for request, own in zip(requests, torch.split(logits, [one.width for one in requests]), strict=True):
            try:
                request.take(own, self._ends)
            except RuntimeError as error:  # there is no drawing from what is no number
                request.over = True
                request.tell(error)

    def _leave(self) -> None:
        """Let go of what is over."""
        numbers, staying, kept = count(), list[Request](), list[int]()
        for request in self._live:
            own = [next(numbers) for _ in range(request.width)]
            if not request.over:
                staying.append(request)
                kept += own
        if self._rows and len(staying) < len(self._live):
            self._rows = batch.keep(self._rows, kept) if kept else None
        self._live = staying

    def _admit(self) -> list[Request]:
        """Return those that have waited longest, as many as there is room for, with their slots."""
        new = list[Request]()
        while self._waiting:
            first = self._waiting[0]
            used = [slot for one in (*self._live, *new) for slot in one.slots]
            if sum(one.width for one in (*self._live, *new)) + first.width > self._most:
                break
            try:
                slots = () if first.over else self._slots.hold(first.folders, beside=used)
            except Exception as error:  # whatever a file may hold
                first.over, slots = True, ()
                first.tell(error)
            if slots is None:
                break
            self._waiting.popleft()
            if not first.over:
                first.slots = slots
                new.append(first)
        return new
