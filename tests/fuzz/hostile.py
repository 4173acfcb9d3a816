"""Values that nobody means, and documents with one of them in it."""

import json
from typing import Any

from hypothesis import strategies as st

TEXTS = [
    "",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "a" * 5000,
    "../../etc/passwd",
    "true",
    "NaN",
    "1e999",
    "é",
    "'\"\\\n",
]
NUMBERS = [0, -1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63) - 1, True, 1.5]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 1e-320, -0.0]

texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=()), max_size=30)
scalars = st.none() | st.sampled_from(NUMBERS) | st.integers() | st.sampled_from(FLOATS) | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


def deep(mark: str, count: int) -> Any:
    """Lists or tables in one another."""
    value: Any = 1
    for _ in range(count):
        value = [value] if mark == "[" else {"settings": value}
    return value


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List where something stands in plain data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, one in inner for found in places(one, (*place, key)))]


@st.composite
def changed(draw: Any, good: dict[str, Any]) -> Any:
    """A good document in which up to three places hold something else, or an unknown key."""
    value: Any = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places(value)[1:])) if places(value)[1:] else ("x",)
        at = value
        for part in parents:
            at = at[part]
        odd = draw(values | st.builds(deep, st.sampled_from("[{"), st.integers(0, 60)))
        if isinstance(at, dict) and draw(st.integers(0, 4)) == 0:
            at[draw(texts)] = odd
        else:
            at[last] = odd
    return value


def as_json(value: Any) -> bytes:
    """Write as JSON would be written by one who does not care, half characters as escapes."""
    return json.dumps(value).encode()


def told(error: Exception) -> None:
    """Hold an error to one short sentence that is safe on a terminal."""
    text = str(error)
    assert text and len(text) < 3000 and text.isprintable(), text[:4000]
