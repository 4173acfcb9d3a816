"""The grammar of recipes: Python's own expressions, read by Python's own parser and never run.

    recipe  = choice {"+" choice}
    choice  = name ["(" [setting {"," setting}] ")"]
    setting = name "=" value {"|" value}
    value   = number | text | word | "[" [value {"," value}] "]" | "{" [word ":" value {"," word ":" value}] "}"

A text is in quotes; a word is not, and means the same, but for true, false and none. Names and words may have hyphens.
Values between which stands "|" are alternatives, and the recipe a grid.
"""

import ast
import warnings
from typing import Any, NoReturn

from offsite.protos.documents import plain, quoted
from offsite.protos.errors import InputError

EXAMPLE = 'crash(keep=20|24, sharing="auto") + quantised(format="nf4")'
TEXT = 10_000  # characters
CONSTANTS = {"true": True, "false": False, "none": None}

Grid = list[tuple[str, dict[str, list[Any]]]]  # each choice's name, and the alternatives of each of its settings


def read(text: str, *, grid: bool) -> Grid:
    """Read a recipe, with alternatives if it is a grid; raises InputError that names the column of the fault."""
    return _Reader(text, grid=grid).chain()


def read_one(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a recipe that stands for one chain; raises InputError."""
    return [(name, {key: value for key, (value,) in grid.items()}) for name, grid in read(text, grid=False)]


class _Reader:
    def __init__(self, text: str, *, grid: bool) -> None:
        if len(text) > TEXT:
            raise InputError(f"recipe {quoted(text)}: longer than {TEXT} characters")
        self._text, self._grid = text.translate({ord("\n"): " ", ord("\r"): " "}).rstrip(), grid
        self._start = len(self._text) - len(self._text.lstrip())
        self._source = self._text[self._start :]
        self._tree = self._parsed()

    def _parsed(self) -> ast.expr:
        if not self._source:
            self._fail(0, "expected a name such as crash, found nothing")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of strange escapes, which stay as they are
                return ast.parse(self._source, mode="eval").body
        except SyntaxError as error:
            self._fail((error.offset or len(self._source) + 1) - 1, error.msg)
        except (ValueError, MemoryError, RecursionError):
            self._fail(0, "expected fewer brackets, signs or digits, and no strange characters")

    def chain(self) -> Grid:
        """Return the choices in their order."""
        return [self._choice(parts) for parts in _sums(self._tree)]

    def _choice(self, parts: list[ast.expr]) -> tuple[str, dict[str, list[Any]]]:
        *words, last = parts
        settings: dict[str, list[Any]] = {}
        if isinstance(last, ast.Call):
            for argument in last.args:
                self._expected(argument, "a setting such as keep=20")
            for keyword in last.keywords:
                if keyword.arg is None or keyword.arg in settings:
                    self._expected(keyword, "a setting that is not there yet, such as keep=20")
                settings[keyword.arg] = self._alternatives(keyword.value)
            last = last.func
        return self._word([*words, last], "a name such as crash"), settings

    def _alternatives(self, node: ast.expr) -> list[Any]:
        values: list[Any] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            if not self._grid:
                self._expected(node.right, "one value, as this is no grid")
            values.append(self._value(node.right))
            node = node.left
        return [self._value(node), *reversed(values)]

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
                return -number if isinstance(node.op, ast.USub) else number
            case ast.List(elts=parts):
                return [self._value(part) for part in parts]
            case ast.Dict(keys=keys, values=values):
                return {self._key(node, key): self._value(value) for key, value in zip(keys, values, strict=True)}
            case ast.BinOp(op=ast.Sub()) | ast.Name():
                (parts, *more) = _sums(node)
                if not more:
                    word = self._word(parts, "a value")
                    return CONSTANTS.get(word, word)
        self._expected(node, "a value")

    def _key(self, table: ast.Dict, key: ast.expr | None) -> str:
        value = None if key is None else self._value(key)
        if not isinstance(value, str):
            self._expected(key or table, "a word or a text for each value of a table")
        return value

    def _word(self, parts: list[ast.expr], expected: str) -> str:
        """Join what Python takes for a difference of names."""
        names = []
        for part in parts:
            if not isinstance(part, ast.Name):
                self._expected(part, expected)
            names.append(part.id)
        return "-".join(names)

    def _expected(self, node: ast.expr | ast.keyword, what: str) -> NoReturn:
        """Raise the error of a node; Python counts its column in bytes of UTF-8."""
        before = self._source.encode()[: node.col_offset].decode(errors="ignore")
        text = ast.get_source_segment(self._source, node) or "nothing"
        self._fail(len(before), f"expected {what}, found {quoted(text[:20])}")

    def _fail(self, at: int, what: str) -> NoReturn:
        raise InputError(
            f"recipe {quoted(self._text)}, column {self._start + at + 1}: {plain(what, most=200)}; "
            f"a recipe reads like {EXAMPLE}"
        ) from None


def _sums(node: ast.expr) -> list[list[ast.expr]]:
    """Split an expression at each "+" into terms, and each of these at "-", which is a hyphen here."""
    terms: list[list[ast.expr]] = [[]]
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        terms[-1].append(node.right)
        if isinstance(node.op, ast.Add):
            terms.append([])
        node = node.left
    terms[-1].append(node)
    return [term[::-1] for term in reversed(terms)]
