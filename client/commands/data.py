"""`offsite data`: look at data where they are, before any task. Nothing of them leaves the machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.client.commands.options import Format

if TYPE_CHECKING:
    from offsite.emulator.examples import Example, Source
    from offsite.emulator.modality import Encoding
    from offsite.emulator.objectives import Objective

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at data where they are, before any task.")

Data = Annotated[Path, typer.Argument(help="A file or a folder of examples, as docs/data.md has them.")]
Rules = Annotated[
    Path | None,
    typer.Option("--policy", help="The site's policy file: which folders, which odd rows, what columns are called."),
]
Renamed = Annotated[
    list[str] | None,
    typer.Option("--column", help="OWN=READ: a column of yours, and as what it is read. May be repeated."),
]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of the model's tokenizer: say what it makes of the rows.")]
Length = Annotated[int, typer.Option(min=8, help="Tokens of a sequence; longer ones are cut or divided.")]


@app.command()
def check(
    data: Data,
    policy: Rules = None,
    column: Renamed = None,
    tokenizer: Tokenizer = None,
    max_length: Length = 256,
    held_out: Annotated[
        Path | None, typer.Option(help="An exam: say which of its rows are known from the data.")
    ] = None,
    format: Format = "text",
) -> None:
    """Count what would be trained on, what is left out and why, and what an exam would know already."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from offsite.client.site import curation
    from offsite.protos.errors import MismatchError

    source, objective, reading = _read(data, policy, column)
    document: dict[str, Any] = {"objective": objective.name, **asdict(reading.census)}
    document["asked_twice"] = curation.asked_twice(reading.examples)
    rows = [("rows for", objective.name), *reading.census.describe()]
    rows.append(("asked twice", f"{document['asked_twice']:,} with another answer than before"))
    if tokenizer:
        coded = _encoding(objective, reading.examples, _tokenizer(tokenizer), max_length, source.odd_rows)
        document["sequences"] = _counts(objective, coded)
        rows += _described(document["sequences"], max_length)
    known: list[curation.Leak] = []
    if held_out:
        _, _, exam = _read(held_out, None, column)
        known = curation.leaks(exam.examples, reading.examples)
        document["held_out"] = {"examples": len(exam.examples), "known": [asdict(leak) for leak in known]}
        rows.append(("exam", f"{len(exam.examples):,} rows, {len(known):,} of them known from the data"))
    if format == "json":
        print(json.dumps(document, indent=2))
    else:
        table = Table(title=Text(f"{data}"), show_header=False, title_justify="left")
        for what, count in rows:
            table.add_row(what, Text(count))
        Console().print(table)
    if known:
        first = f"{known[0].place} has {known[0].why} as {known[0].source}"
        raise MismatchError(
            f"{len(known):,} rows of the exam are known from the data, so that it would flatter: {first}; take them "
            "out, or have `offsite data split` make the exam"
        )


@app.command()
def preview(
    data: Data,
    policy: Rules = None,
    column: Renamed = None,
    tokenizer: Tokenizer = None,
    max_length: Length = 256,
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many before.")] = 0,
    format: Format = "text",
) -> None:
    """Show rows as a model gets them: what it is given, and in bold between brackets what it is to learn."""
    from rich.console import Console
    from rich.text import Text

    from offsite.protos.errors import InputError
    from offsite.protos.output import say

    source, objective, reading = _read(data, policy, column)
    examples = reading.examples[skip : skip + rows]
    if not examples:
        raise InputError(f"{data}: holds {len(reading.examples):,} examples, and --skip {skip} leaves out all of them")
    shown: list[dict[str, Any]] = [{"place": example.place, "row": example.row} for example in examples]
    if tokenizer is not None:
        from offsite.emulator import modality

        words = _tokenizer(tokenizer)
        for example, one in zip(examples, shown, strict=True):
            try:
                samples = _encoding(objective, [example], words, max_length, source.odd_rows).samples
                texts = [
                    [{"text": words.decode(ids), "learned": learned} for ids, learned in pieces]
                    for pieces in modality.pieces(objective.text(samples))
                ]
                one |= {"sequences": texts, "error": ""}
            except InputError as error:
                one |= {"sequences": [], "error": str(error)}
    if format == "json":
        say(format, shown)
        return
    console = Console(soft_wrap=True)
    for one in shown:
        console.print(Text(one["place"], style="dim"))
        if tokenizer is None:
            console.print(Text(json.dumps(one["row"], ensure_ascii=False)))
        elif one["error"]:
            console.print(Text(one["error"], style="dim"))
        for spans in one.get("sequences", ()):
            marked = ((f"[{span['text']}]", "bold") if span["learned"] else span["text"] for span in spans)
            console.print(Text.assemble(*marked))


@app.command()
def split(
    data: Data,
    out: Annotated[Path, typer.Argument(help="Folder for train.jsonl and held-out.jsonl.")],
    policy: Rules = None,
    column: Renamed = None,
    share: Annotated[float, typer.Option(min=0.001, max=0.9, help="Of the rows, to hold out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another one holds out others.")] = 0,
    format: Format = "text",
) -> None:
    """Hold rows out for an exam that training knows nothing of; rows that come later move none of these."""
    from offsite.client.site import curation
    from offsite.protos.output import say

    _, _, reading = _read(data, policy, column)
    train, held_out, neither = curation.split(reading.examples, share=share, seed=seed)
    curation.write(out, {"train.jsonl": train, "held-out.jsonl": held_out})
    say(
        format,
        {"folder": str(out), "train": len(train), "held_out": len(held_out), "neither": neither},
        f"{out}: {len(train):,} rows to train on and {len(held_out):,} held out; {neither:,} are in neither, because "
        "they are there twice or the exam would know them",
    )


def _read(data: Path, policy: Path | None, column: list[str] | None) -> "tuple[Source, Objective, Any]":
    """Read rows for the objective that they are for; raises InputError, RefusedError."""
    from dataclasses import replace

    from offsite.client.site.policy import Policy
    from offsite.emulator import objectives
    from offsite.emulator.examples import Source
    from offsite.protos.errors import InputError

    source = Source(data)
    if policy:
        rules = Policy.load(policy)
        rules.check_data(data)
        source = rules.source(data)
    names = dict(_pair(one) for one in column or [])
    source = replace(source, columns={**source.columns, **names})
    try:
        return source, *objectives.survey(source)
    except ValueError as error:
        hint = "; --column OWN=READ says what yours are called" if "found the columns" in str(error) else ""
        raise InputError(f"{error}{hint}") from None


def _pair(text: str) -> tuple[str, str]:
    own, equals, read = text.partition("=")
    if not (own and equals and read):
        raise typer.BadParameter(f"expected OWN=READ, such as question=prompt, found {text!r}", param_hint="--column")
    return own, read


def _encoding(
    objective: "Objective", examples: "list[Example]", tokenizer: Any, length: int, odd_rows: Any
) -> "Encoding":
    from offsite.emulator import modality
    from offsite.protos.errors import InputError

    try:
        return objective.encode(modality.default(), examples, tokenizer, max_length=length, odd_rows=odd_rows)
    except ValueError as error:
        raise InputError(str(error)) from None


def _tokenizer(folder: Path) -> Any:
    from offsite.emulator import zoo
    from offsite.protos.errors import InputError

    try:
        return zoo.load_tokenizer(folder)
    except ValueError as error:
        raise InputError(str(error)) from None


def _counts(objective: "Objective", coded: "Encoding") -> dict[str, Any]:
    """Return what a tokenizer makes of examples, in sequences and tokens."""
    from statistics import quantiles

    sizes = sorted(map(len, coded.samples))
    learned = sum(objective.text([sample]).targets for sample in coded.samples)
    tenths = quantiles(sizes, n=10, method="inclusive") if len(sizes) > 1 else sizes * 9
    lengths = {"median": tenths[4], "ninth_decile": tenths[8], "longest": sizes[-1]}
    return {**coded.counts, "tokens": sum(sizes), "learned": learned, **lengths, "warnings": coded.warnings}


def _described(counts: dict[str, Any], length: int) -> list[tuple[str, str]]:
    return [
        ("sequences", f"{counts['sequences']:,}, of {counts['divided']:,} texts that were divided"),
        ("tokens", f"{counts['tokens']:,}, of which {counts['learned']:,} are learned"),
        (
            "a sequence",
            f"{counts['median']:g} tokens, nine of ten at most {counts['ninth_decile']:g}, the longest "
            f"{counts['longest']:,}",
        ),
        (f"cut at {length:,}", f"{counts['cut']:,}, of which {counts['without_target']:,} have nothing left to learn"),
        *(("warning", warning) for warning in counts["warnings"]),
    ]
