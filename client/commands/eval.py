"""`offsite eval`: what runs have come to, over more than one of them."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.client.commands.options import Coordinator, Format, Kit, optional
from offsite.client.commands.run import Id
from offsite.protos.figure_names import USUAL, Named

if TYPE_CHECKING:
    from rich.console import RenderableType

    from offsite.client.beside import Comparison
    from offsite.client.forgetting import Forgetting

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Say what runs have come to, over more than one.")


@app.command()
def forgetting(
    id: Id,
    coordinator: Coordinator,
    identity: Kit,
    out: Annotated[Path | None, typer.Option(help="Folder for forgetting.json and a plot, forgetting.svg.")] = None,
    format: Format = "text",
) -> None:
    """Say what a run, and those that led to it, have learned and forgotten of their tasks."""
    from rich.console import Console

    from offsite.client.session import connect

    with connect(coordinator, identity=identity) as session:
        stream = session.forgetting(id)
    document = json.dumps(stream.plain(), indent=2)
    if out:
        from offsite.client.plots import forgetting as plot

        out.mkdir(parents=True, exist_ok=True)
        (out / "forgetting.json").write_text(document + "\n")
        (out / "forgetting.svg").write_text(plot(stream))
    if format == "json":
        print(document)
    else:
        Console().print(*table(stream), sep="\n")


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]RUN...", help="Ids of runs, or report.json of some, or the folders of these."),
    ],
    coordinator: Annotated[str | None, optional("coordinator")],
    identity: Annotated[Path | None, optional("identity")],
    figure: Annotated[Named, typer.Option(help="Which figure.")] = USUAL,
    format: Format = "text",
) -> None:
    """Put a figure of several runs beside each other: a federation, its sites alone, other methods."""
    from rich.console import Console

    from offsite.client.beside import compare as beside

    comparison = beside(_reports(runs, coordinator, identity), figure=figure)
    if format == "json":
        print(json.dumps(comparison.plain(), indent=2))
    else:
        Console().print(side_by_side(comparison))


def _reports(runs: list[str], coordinator: str | None, identity: Path | None) -> dict[str, dict[str, Any]]:
    """Return the reports of runs by name, from files or from the coordinator; raises InputError."""
    from contextlib import ExitStack

    from offsite.client.session import connect
    from offsite.protos.errors import InputError

    reports: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        session = None
        for one in runs:
            name, _, where = one.rpartition("=")
            path = Path(where) / "report.json" if Path(where).is_dir() else Path(where)
            if path.is_file():
                report = _report(path)
            elif coordinator is None or identity is None:
                raise InputError(
                    f"{where}: no such file or folder; for the id of a run give --coordinator and --identity"
                )
            else:
                session = session or stack.enter_context(connect(coordinator, identity=identity))
                run = session.run(where)
                report = run.report
                if not report:
                    raise InputError(f"run {where} is {run.state} and has no report yet; wait for its end")
            if (name or where) in reports:
                raise InputError(f"{name or where} is named twice; write NAME={where} for another name")
            reports[name or where] = report
    return reports


def _report(path: Path) -> dict[str, Any]:
    from offsite.protos.errors import InputError

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: no report of a run: {error}") from None
    if not isinstance(report, dict) or not {"sites", "overall", "base", "bytes"} <= report.keys():
        raise InputError(f"{path}: no report of a run; expected the report.json of a run, a simulation or a demo")
    return report


def side_by_side(comparison: "Comparison") -> "RenderableType":
    """Draw a comparison, a row for each held-out set, a column for each run."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from offsite.client.figures import short
    from offsite.protos.documents import plain
    from offsite.protos.figures import FIGURES

    what = FIGURES[comparison.figure].title
    grid = Table(title=f"perplexity, {what} (lower is better)", title_justify="left", box=SIMPLE_HEAD)
    grid.add_column("")
    for head in ("base\nzero-shot", *map(plain, comparison.runs)):
        grid.add_column(Text(head), justify="right")
    for name in comparison.sets:
        values = [row.get(name) for row in comparison.runs.values()]
        best = min((value for value in values if value is not None), default=None)
        cells = [Text(short(value), "bold green" if value is not None and value == best else "") for value in values]
        grid.add_row(plain(name, most=64), short(comparison.base.get(name)), *cells)
        if name == comparison.sets[-2]:
            grid.add_section()
    grid.add_row("MB up", "", *(f"{size / 1e6:.2f}" for size in comparison.bytes_up.values()), style="dim")
    return grid


def table(stream: "Forgetting") -> "tuple[RenderableType, ...]":
    """Draw the perplexities of a stream, a row for each run, and say what was forgotten."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from offsite.client.figures import short
    from offsite.protos.documents import plain

    grid = Table(title="perplexity of the plug-in by task", title_justify="left", box=SIMPLE_HEAD)
    for head in ("after", "learned", *stream.tasks):
        grid.add_column(plain(head), justify="right" if head in stream.tasks else "left")
    grid.add_column("MB up", justify="right", style="dim")
    grid.add_column("MB kept", justify="right", style="dim")
    for at, losses in enumerate(stream.losses):
        stage = stream.stages[at - 1] if at else None
        cells: list[Any] = [short(math.exp(losses[task])) if task in losses else "" for task in stream.tasks]
        first = (stage.run, plain(stage.task)) if stage else ("the base", "")
        sizes = (f"{stage.bytes_up / 1e6:.2f}", f"{stage.kept_bytes / 1e6:.2f}") if stage else ("", "")
        grid.add_row(*first, *cells, *sizes)
    said = [f"{task} forgot {stream.of(task):+.3f}" for task in stream.earlier if math.isfinite(stream.of(task))]
    means = [f"{name} {value:+.3f}" for name, value in stream.summary().items() if math.isfinite(value)]
    return grid, *(Text(plain(f"in nats a token: {', '.join(part)}")) for part in (means, said) if part)
