"""Recipes: plug-ins as one writes them in a line, such as `crash(keep=20,sharing=auto)+quantised(format=nf4)`.

    recipe  = choice {"+" choice}
    choice  = name ["(" [setting {"," setting}] ")"]
    setting = name "=" value {"|" value}
    value   = number | "true" | "false" | "none" | word | '"' JSON text '"' | "[" [value {"," value}] "]"

Values between which stands "|" are alternatives, and the recipe a grid: it stands for one chain per combination.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offsite.protos.documents import parse as parse_document
from offsite.protos.documents import quoted, read_toml
from offsite.protos.errors import InputError
from offsite.protos.spec import Chain, Choice

EXAMPLE = "crash(keep=20|24,sharing=auto)+quantised(format=nf4)"
TEXT, CHAINS, DEPTH = 10_000, 4096, 16  # characters of a recipe, chains of a grid, lists in one another
_NAME = re.compile(r"[A-Za-z][\w-]*", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.-])", re.ASCII)
_WORD = re.compile(r"\w[\w.-]*", re.ASCII)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_CONSTANTS = {"true": True, "false": False, "none": None}


def parse(text: str) -> Chain:
    """Read a recipe that stands for one chain; raises InputError that names the place of the fault."""
    reader = _Reader(text, grid=False)
    return _product(reader.whole())[0]


def parse_one(text: str) -> Choice:
    """Read a recipe of a single choice, such as `ends(bottom=1,top=1)`; raises InputError."""
    (choice, *more) = parse(text)
    if more:
        raise InputError(
            f"recipe {quoted(text)}: expected one choice such as {render([choice])}, found {len(more) + 1}"
        )
    return choice


def expand(text: str) -> list[Chain]:
    """Read a grid: one chain per combination of alternatives, the first setting's varying last. Raises InputError."""
    return _product(_Reader(text, grid=True).whole())


def gather(grids: Sequence[str]) -> list[Chain]:
    """Expand several grids, each a recipe or the path of a TOML file with a list `recipes`; equal chains count once."""
    chains: dict[str, Chain] = {}
    for grid in grids:
        for text in _listed(Path(grid)) if grid.endswith(".toml") else [grid]:
            chains |= {render(chain): chain for chain in expand(text)}
    return list(chains.values())


def render(chain: Sequence[Choice]) -> str:
    """Write a chain as the recipe that reads back as it; raises InputError if a setting is a table."""
    return "+".join(f"{choice.name}{_settings(choice.settings)}" for choice in chain)


def _listed(path: Path) -> list[str]:
    found = read_toml(path)
    recipes = found.get("recipes")
    if set(found) != {"recipes"} or not isinstance(recipes, list) or not all(isinstance(one, str) for one in recipes):
        raise InputError(f'{path}: expected one list of texts, recipes = ["{EXAMPLE}"]')
    return recipes


def _product(chain: Sequence[tuple[str, Mapping[str, Sequence[Any]]]]) -> list[Chain]:
    if math.prod(len(values) for _, grid in chain for values in grid.values()) > CHAINS:
        raise InputError(f"recipe: a grid of more than {CHAINS} chains; write a smaller one")
    choices = [
        [
            parse_document(Choice, {"name": name, "settings": dict(zip(grid, values, strict=True))}, where="recipe")
            for values in itertools.product(*grid.values())
        ]
        for name, grid in chain
    ]
    return list(itertools.product(*choices))


def _settings(settings: Mapping[str, Any]) -> str:
    written = ",".join(f"{name}={_value(value)}" for name, value in settings.items())
    return f"({written})" if written else ""


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, str):
        plain = _WORD.fullmatch(value) and value not in _CONSTANTS and not _NUMBER.fullmatch(value)
        return value if plain else json.dumps(value)
    if value is None or isinstance(value, (bool, int, float)):
        return str(value).lower()
    raise InputError(f"a recipe cannot hold a setting of the kind {type(value).__name__}: {value!r}")


class _Reader:
    """Reads a recipe from left to right."""

    def __init__(self, text: str, *, grid: bool) -> None:
        if len(text) > TEXT:
            raise InputError(f"recipe {quoted(text)}: longer than {TEXT} characters")
        self._text, self._at, self._grid, self._depth = text, 0, grid, 0

    def whole(self) -> list[tuple[str, dict[str, list[Any]]]]:
        """Read to the end: each choice's name, and the alternatives of each of its settings."""
        chain = [self._choice()]
        while self._take("+"):
            chain.append(self._choice())
        if self._rest():
            raise self._fault("'+' or the end")
        return chain

    def _choice(self) -> tuple[str, dict[str, list[Any]]]:
        name = self._match(_NAME, "a name such as crash")
        settings: dict[str, list[Any]] = {}

        def setting() -> None:
            key = self._match(_NAME, "the name of a setting")
            if key in settings:
                self._at -= len(key)
                raise self._fault(f"a setting that {name} does not have yet")
            self._need("=")
            settings[key] = self._alternatives()

        if self._take("("):
            self._listing(setting, ")")
        return name, settings

    def _alternatives(self) -> list[Any]:
        values = [self._literal()]
        while self._rest().startswith("|"):
            if not self._grid:
                raise self._fault("one value, as this is no grid")
            self._take("|")
            values.append(self._literal())
        return values

    def _literal(self) -> Any:
        if self._take("["):
            values: list[Any] = []
            self._depth += 1
            if self._depth > DEPTH:
                raise self._fault(f"at most {DEPTH} lists in one another")
            self._listing(lambda: values.append(self._literal()), "]")
            self._depth -= 1
            return values
        rest = self._rest()
        if number := _NUMBER.match(rest):
            text = self._match(_NUMBER, "a number")
            if len(text) > 300:
                self._at -= len(text)
                raise self._fault("a number of at most 300 digits")
            return int(text) if number[0].lstrip("+-").isdecimal() else float(text)
        if rest.startswith('"'):
            start = self._at
            quoted = self._match(_QUOTED, 'a text that ends with "')
            try:
                return json.loads(quoted)
            except ValueError:
                self._at = start
                raise self._fault("a text as in JSON") from None
        word = self._match(_WORD, "a value")
        return _CONSTANTS.get(word, word)

    def _listing(self, read: Callable[[], None], end: str) -> None:
        """Read what stands between commas up to `end`."""
        if self._take(end):
            return
        read()
        while not self._take(end):
            self._need(",", f"',' or {end!r}")
            read()

    def _rest(self) -> str:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        return self._text[self._at :]

    def _take(self, mark: str) -> bool:
        found = self._rest().startswith(mark)
        self._at += len(mark) * found
        return found

    def _need(self, mark: str, expected: str | None = None) -> None:
        if not self._take(mark):
            raise self._fault(expected or repr(mark))

    def _match(self, pattern: re.Pattern[str], expected: str) -> str:
        found = pattern.match(self._rest())
        if not found:
            raise self._fault(expected)
        self._at += found.end()
        return found[0]

    def _fault(self, expected: str) -> InputError:
        found = repr(self._text[self._at]) if self._rest() else "the end"
        return InputError(
            f"recipe {quoted(self._text)}, column {self._at + 1}: expected {expected}, found {found}; "
            f"a recipe reads like {EXAMPLE}"
        )
