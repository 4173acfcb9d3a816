"""`offsite run new`: a file that says a run, with a comment on each field."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from offsite.client.commands.options import Format
from offsite.protos.output import say

# Written out whether or not they differ from the default: what a run is mostly about.
SHOWN = ("model", "rounds", "public", "builders", "method", "evaluation")


def new(
    file: Annotated[Path, typer.Argument(help="The file; it must not be there yet.")] = Path("run.toml"),
    model: Annotated[
        str | None, typer.Option(help="As the owner's policy names it; asked for on a terminal if it is not given.")
    ] = None,
    site: Annotated[list[str] | None, typer.Option(help="A site that takes part; repeatable. (default: all)")] = None,
    exam: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXTS", help="Held-out examples at the coordinator; repeatable.")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="Another field, NAME=VALUE, such as training.steps=20; a choice's value can be a recipe."),
    ] = None,
    format: Format = "text",
) -> None:
    """Write a run's file to begin from: what is chosen, and every other field with its default, commented out."""
    from offsite.protos.assignments import assign
    from offsite.protos.documents import parse, to_plain
    from offsite.protos.errors import ConflictError, InputError
    from offsite.protos.spec import RunSpec

    if model is None:
        if not sys.stdin.isatty():
            raise InputError("which model is to be tuned? name it with --model")
        model = typer.prompt("model, as the owner's policy names it")
    exams = dict(_exam(one) for one in exam or ())
    given = {"model": model, "sites": site or [], "evaluation": exams}
    document = parse(RunSpec, assign(set or [], given, RunSpec), where="run")
    if file.exists():
        raise ConflictError(f"{file}: is there already; name a new file")
    file.write_text(written(document), encoding="utf-8")
    lines = (f"Wrote {file}. Read it, then: offsite run submit {file} --watch",)
    say(format, {"file": str(file), "spec": to_plain(document)}, *lines)


def written(document: Any) -> str:
    """Return a run as commented TOML that reads back as it."""
    lines = _lines(document, "training")
    return "\n".join([*lines, "", "[training]  # of one round at one site", *_lines(document.training), ""])


def _lines(document: Any, *without: str) -> list[str]:
    from offsite.protos.documents import to_plain
    from offsite.protos.fields import comments, defaults

    usual, lines = defaults(type(document)), []
    for name, comment in comments(type(document)).items():
        if name in without:
            continue
        value = to_plain(getattr(document, name)) if name in usual else getattr(document, name)
        off = "" if name in SHOWN or name not in usual or value != usual[name] else "# "
        lines.append(f"{off}{name} = {_toml(name, value)}{comment and f'  # {comment}'}")
    return lines


def _toml(name: str, value: Any) -> str:
    """Write a value in a line: choices as recipes, a table inline."""
    from offsite.protos.recipes import render
    from offsite.protos.spec import Choice

    chain = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
    if all(isinstance(one, dict) and one.keys() == {"name", "settings"} for one in chain):
        return json.dumps(render([Choice(**one) for one in chain]), ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(key)} = {json.dumps(one)}' for key, one in value.items())} }}"
    return json.dumps(value, ensure_ascii=False) if value is not None else "..."


def _exam(text: str) -> tuple[str, str]:
    name, equals, texts = text.partition("=")
    if not (name and equals and texts):
        raise typer.BadParameter(f"expected NAME=TEXTS, such as ward=held-out.jsonl, got {text!r}", param_hint="--exam")
    return name, texts
