"""From tokens to text while they come: no half characters, and nothing from a stop on."""

from collections.abc import Sequence
from typing import Any

HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for a character of which not all bytes are there
CONTEXT = 5  # tokens before an answer, by which a tokenizer tells whether it begins with a space


class Speech:
    """The text of an answer, token by token."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens = list(prompt[-CONTEXT:])
        self._before, self._said = len(self._text()), 0
        self.over = False  # whether a stop has come

    def take(self, token: int | None) -> str:
        """Add a token, or the end where it is None; return what the text has by now and had not before."""
        if token is not None:
            self._tokens.append(token)
        text = self._text()[self._before :]
        if ends := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            text, self.over = text[: min(ends)], True
        elif token is not None:
            text = text[: len(text) - self._unsure(text)]
        new, self._said = text[self._said :], max(self._said, len(text))
        return new

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _unsure(self, text: str) -> int:
        """Count the characters at the end that may become others, or the beginning of a stop."""
        begun = [size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        return max(begun, default=len(text) - len(text.rstrip(HALF)))
