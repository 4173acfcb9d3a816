"""`offsite eval`: what runs have come to, over more than one of them."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.client.commands.options import Coordinator, Format, Kit
from offsite.client.commands.run import Id

if TYPE_CHECKING:
    from rich.console import RenderableType

    from offsite.client.forgetting import Forgetting

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Say what runs have come to, over more than one.")


@app.callback()
def _group() -> None:
    """Keep the one command a command by its name."""


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
