"""The ranges of what documents hold: every number has bounds, every text and every collection a length.

A bool is no number and a float no integer. What is beyond a range is beyond the database, the wire or reason.
"""

import math
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, Field

COUNT = 2**31 - 1
AMOUNT = 2**53  # up to here a float, and so any reader of JSON, holds every integer
SEED = 2**63 - 1
LARGEST = 1e300
DEPTH = 32  # of lists and tables in one another
ITEMS = 500_000  # of one document, in all
TEXT = 1 << 20  # characters

Positive = Annotated[int, Field(strict=True, ge=1, le=COUNT)]
Count = Annotated[int, Field(strict=True, ge=0, le=COUNT)]
Amount = Annotated[int, Field(strict=True, ge=0, le=AMOUNT)]  # of bytes, parameters, tokens or operations
Seed = Annotated[int, Field(strict=True, ge=0, le=SEED)]
Finite = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(strict=True, ge=0, le=LARGEST, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(strict=True, gt=0, le=LARGEST, allow_inf_nan=False)]
Moment = Annotated[float, Field(strict=True, ge=0, le=1e11, allow_inf_nan=False)]  # seconds since the epoch
Nanoseconds = Annotated[int, Field(strict=True, ge=0, le=SEED)]  # since the epoch, as a file's time is kept
Flag = Annotated[bool, Field(strict=True)]


def finite(value: float) -> float | None:
    """Return a number that a document can hold; None for one that is infinite, NaN or beyond LARGEST."""
    return value if abs(value) <= LARGEST else None


def _readable(text: str) -> str:
    if not readable(text):
        raise ValueError("must hold no control characters")
    return text


def readable(text: str) -> bool:
    """Tell whether a text holds nothing that steers a terminal: controls, line ends, marks of direction, surrogates."""
    if text.isascii():
        return text.isprintable()
    return all(unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


Line = Annotated[str, Field(max_length=200), AfterValidator(_readable)]  # what people read on one line
Sentence = Annotated[str, Field(max_length=2000)]  # a message; shown only through `documents.plain`
Place = Annotated[str, Field(max_length=4096), AfterValidator(_readable)]  # a path, a hub id, a name of a model
Word = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_readable)]
_SIGNS = "letters, digits, '.', '_' and '-', a letter or a digit first"


def _text(pattern: str, most: int, meant: str) -> Any:
    """Return a field whose description is what a fault says was expected."""
    return Field(pattern=pattern, max_length=most, description=meant)


Digest = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9:._-]{0,127}$", 128, "a digest, such as sha256:HEX")]
Name = Annotated[str, _text(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", 64, f"a name of at most 64 {_SIGNS}")]
# Of sites; see methods.
Tier = Annotated[str, _text(r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$", 64, f"a tier of at most 64 {_SIGNS}")]
# What a run learns; short enough for names that are made of it.
Task = Annotated[str, _text(r"^([A-Za-z0-9][A-Za-z0-9._-]{0,39})?$", 40, f"a task of at most 40 {_SIGNS}")]
Start = Annotated[
    str, _text(r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63}(:[1-9][0-9]{0,8})?)?$", 80, "RUN, or RUN:ROUND counted from one")
]


def check_plain(value: Any, *, depth: int = DEPTH, items: int = ITEMS, text: int = TEXT) -> None:
    """Raise ValueError unless a value is plain data (None, bools, numbers, texts, lists, tables) within bounds."""
    level = [value]
    while level:
        items -= len(level)
        if items < 0:
            raise ValueError("holds too many values")
        if not depth:
            raise ValueError("holds lists or tables that are nested too deeply")
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                deeper += [*one, *one.values()]
            elif isinstance(one, list | tuple):
                deeper += one
            else:
                _check_scalar(one, text)
        level, depth = deeper, depth - 1


def _check_scalar(value: Any, text: int) -> None:
    if isinstance(value, str):
        if len(value) > text:
            raise ValueError(f"holds a text of more than {text} characters")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("holds half a character (a lone surrogate)")
    elif isinstance(value, float):
        if not math.isfinite(value) or abs(value) > LARGEST:
            raise ValueError(f"{value} is not a number of at most {LARGEST:g}")
    elif isinstance(value, int):
        if abs(value) > SEED:
            raise ValueError(f"holds an integer beyond {SEED}")
    elif value is not None:
        raise ValueError(f"{value} ({type(value).__name__}) is neither a number, a text, a list nor a table")


def _settings(value: dict[str, Any]) -> dict[str, Any]:
    check_plain(value, depth=8, items=10_000, text=4096)
    return value


Settings = Annotated[
    dict[Word, Any], Field(max_length=64), AfterValidator(_settings)
]  # of a plug-in, or other plain data
