"""A site's look at its rows before any task: what an exam shares with what is trained on, and how to part the two.

Texts are compared by their words, in small letters and without what is between them. Nothing here leaves the site.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from offsite.emulator.examples import Example
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.security.draws import derive

RUN = 13  # words in a row that two texts have by copying (Brown et al., arXiv 2005.14165, appendix C)
COMMON = 10  # rows that have them, above which they are a template's: so does that paper
FEWEST = 5  # times as many questions as are held out: at most so small a part of them never trains
COPIED = f"{RUN} words in a row"
WORD = re.compile(r"\w+")
Words = tuple[str, ...]
Mark = tuple[str, Words]


@dataclass(frozen=True)
class Leak:
    """A row of an exam that is known from training."""

    place: str  # of the row
    source: str  # and of one that it is known from
    why: str


def leaks(held_out: Sequence[Example], trained: Sequence[Example]) -> list[Leak]:
    """Return what rows of an exam share with rows that are trained on, in the exam's order, each once.

    That is all of their words, what is asked, or RUN words in a row that are not a template's, in many rows.
    """
    shared = _shared(held_out, trained)
    return [
        Leak(example.place, trained[shared[mark][0]].place, mark[0])
        for example in held_out
        if (mark := next((one for one in _marks(example) if one in shared), None))
    ]


def asked_twice(examples: Iterable[Example]) -> int:
    """Count the examples whose question an earlier one has with another answer."""
    answers: dict[Words, Words] = {}
    count = 0
    for example in examples:
        if example.asked:
            own = _words(_text(example))
            count += answers.setdefault(_words(example.asked), own) != own
    return count


def split(examples: Sequence[Example], *, share: float, seed: int) -> tuple[list[Example], list[Example], int]:
    """Part examples in those to train on and an exam of about a share; return them, and how many are in neither.

    Where an example goes depends on itself and the seed alone, so that more rows move none, and those that ask the same
    go together. What is trained on leaves out copies, and what the exam would know. Raises InputError for a part that
    would be empty.
    """
    trained, held_out = list[Example](), list[Example]()
    for example in {repr(one): one for one in examples}.values():
        digest = blake2b(json.dumps([seed, _question(example)]).encode(), digest_size=8).digest()
        (held_out if int.from_bytes(digest, "big") < share * 2**64 else trained).append(example)
    known = {row for rows in _shared(held_out, trained).values() for row in rows}
    kept = [example for row, example in enumerate(trained) if row not in known]
    for part, name in ((kept, "train on"), (held_out, "hold out")):
        if not part:
            raise InputError(
                f"{len(examples)} examples leave none to {name} with share {share:g} and seed {seed}; take another "
                "share or seed, or add examples"
            )
    return kept, held_out, len(examples) - len(kept) - len(held_out)


def most_held_out(examples: Sequence[Example]) -> int:
    """Return how many questions can be held out of some examples, at most."""
    return len({*_groups(examples)}) // FEWEST


def hold_out(
    examples: Sequence[Example], *, count: int, secret: bytes, known: Sequence[Example] = ()
) -> tuple[list[Example], list[Example]]:
    """Part examples in those to train on, in their order, and about `count` to measure on, each once.

    Where an example goes depends on a secret of the site and its own words: of all questions those with the lowest
    keyed hashes are held out, whatever their order, and rows that ask the same go together. More rows move none that
    was trained on to the other side. What would be known from training, or from the rows `known`, is in neither part.
    Of fewer than FEWEST times as many questions none is held out.
    """
    groups, key = _groups(examples), derive(secret, "held out")
    ranked = {
        group: blake2b(json.dumps(group).encode(), key=key, digest_size=16).digest() for group in dict.fromkeys(groups)
    }
    if not count or len(ranked) < FEWEST * count:
        return list(examples), []
    apart = {*sorted(ranked, key=ranked.__getitem__)[:count]}
    trained = [one for one, group in zip(examples, groups, strict=True) if group not in apart]
    distinct = {repr(one): one for one, group in zip(examples, groups, strict=True) if group in apart}
    held_out = sorted(distinct.values(), key=repr)  # whatever the order of the files
    shared = _shared(held_out, [*trained, *known])
    return trained, [one for one in held_out if shared.keys().isdisjoint(_marks(one))]


def _groups(examples: Sequence[Example]) -> list[Words]:
    """Return for each example the words by which it is held out: its question, unless that is many examples'."""
    sizes = Counter(map(_question, examples))
    return [_question(one) if sizes[_question(one)] <= COMMON else _words(_text(one)) for one in examples]


def write(folder: Path, parts: dict[str, list[Example]]) -> None:
    """Write parts as files of JSON Lines for their owner alone; raises ConflictError where one is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    if there := [name for name in parts if (folder / name).exists()]:
        raise ConflictError(f"{folder / there[0]} exists; choose another folder, or remove it")
    for name, part in parts.items():
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(one.row, ensure_ascii=False, default=str) + "\n" for one in part)


def _shared(held_out: Sequence[Example], trained: Sequence[Example]) -> dict[Mark, list[int]]:
    """Return what an exam shares with rows that are trained on, and with which of them."""
    shared: dict[Mark, list[int]] = {mark: [] for example in held_out for mark in _marks(example)}
    for row, example in enumerate(trained):
        for mark in {*_marks(example)} & shared.keys():
            shared[mark].append(row)
    return {mark: rows for mark, rows in shared.items() if rows and (mark[0] != COPIED or len(rows) <= COMMON)}


def _marks(example: Example) -> Iterator[Mark]:
    """Yield what a text shares with none that is not a copy, and why that says so; the plainest first."""
    text = _words(_text(example))
    yield "the same words", text
    if example.asked:
        yield "the same question", _words(example.asked)
    for start in range(len(text) - RUN + 1):
        yield COPIED, text[start : start + RUN]


def _question(example: Example) -> Words:
    """Return the words that an example asks with, or all of one that asks nothing."""
    return _words(example.asked or _text(example))


def _words(text: str) -> Words:
    """Return the words of a text; one of signs alone is a word."""
    return tuple(WORD.findall(text.casefold())) or (text,)


def _text(example: Example) -> str:
    """Return all texts of a row, whatever its shape."""
    return "\n".join(_strings(example.row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            if key != "role":
                yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)
