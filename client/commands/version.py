"""`offsite version`: what rounds ended in, where that comes from, and how it is taken back."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.client.commands.options import Coordinator, Format, Kit
from offsite.protos.output import as_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite.client.answers import Version

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at the versions of runs, and take them back.")

Named = Annotated[str, typer.Argument(metavar="RUN:ROUND", help="A version: a run's id, and a round counted from one.")]


@app.command()
@app.command("list", hidden=True)
def ls(
    coordinator: Coordinator,
    identity: Kit,
    run: Annotated[
        str | None, typer.Argument(help="A run, all of whose versions are listed. (default: the newest of each run)")
    ] = None,
    format: Format = "text",
) -> None:
    """List the versions of a run, after those that it went on from, oldest first."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity) as session:
        versions = session.versions(run)
    _print(versions, format)


@app.command()
def show(
    version: Annotated[str, typer.Argument(metavar="RUN[:ROUND]", help="A version; of a run alone its newest.")],
    coordinator: Coordinator,
    identity: Kit,
    format: Format = "text",
) -> None:
    """Show one version, and the versions that led to it."""
    from offsite.client.progress import clock
    from offsite.client.session import connect
    from offsite.protos.documents import plain
    from offsite.protos.errors import NotFoundError

    run, _, number = version.partition(":")
    with connect(coordinator, identity=identity) as session:
        versions = session.versions(run)
    standing = [one for one in versions if one.run == run and not one.withdrawal]
    chosen = [one for one in versions if one.id == version] if number else standing[-1:]
    if not chosen:
        raise NotFoundError(f"there is no version {version}; `offsite version ls {run}` shows those there are")
    (one,) = chosen
    led = versions[: versions.index(one)]
    if format == "json":
        print(as_json({**asdict(one), "lineage": [before.id for before in led]}, indent=2))
        return
    lines = {
        "version": one.id,
        "task": one.task,
        "submitted by": one.owner,
        "at": clock(one.at),
        "went on from": one.start,
        "figures": ", ".join(f"{name} {value:.4g}" for name, value in sorted(one.figures.items())),
        "sites": ", ".join(one.sites),
        "keeps": ", ".join(one.state),
        "adapter": one.digest,
        "led to it": " > ".join(before.id for before in led),
        "taken back": _withdrawn(one),
    }
    for name, value in lines.items():
        if value:
            print(plain(f"{name:13} {value}"))


@app.command()
def rollback(
    version: Named,
    coordinator: Coordinator,
    identity: Kit,
    reason: Annotated[str, typer.Option(help="Why; it stays with what is taken back.")],
    format: Format = "text",
) -> None:
    """Take back all that came after a version, in its run and in those that went on from there."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity) as session:
        versions = session.roll_back(version, reason=reason)
    _print(versions, format)


@app.command()
def release(
    version: Annotated[str, typer.Argument(metavar="RUN[:ROUND]", help="A version; of a run alone all of it.")],
    coordinator: Coordinator,
    identity: Kit,
    reason: Annotated[str, typer.Option(help="Why; it stays in the run's audit trail.")],
    format: Format = "text",
) -> None:
    """Let out what the gate of a run held back; it is for the owner."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity) as session:
        versions = session.release(version, reason=reason)
    _print(versions, format)


def _print(versions: "Sequence[Version]", format: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from offsite.client.progress import clock
    from offsite.protos.documents import plain
    from offsite.protos.figures import PLUG_IN

    if format == "json":
        print(as_json([asdict(one) for one in versions], indent=2))
        return
    if not versions:
        print("no versions yet; each round of a run ends in one")
        return
    console = Console(highlight=False)
    console.print(f"{'version':12}  {'task':12}  {'at':19}  {'plug-in':>8}  {'from':12}  sites")
    for one in versions:
        figure = f"{one.figures[PLUG_IN]:.2f}" if PLUG_IN in one.figures else ""
        row = f"{one.id:12}  {one.task:12}  {clock(one.at):19}  {figure:>8}  {one.start:12}  {', '.join(one.sites)}"
        console.print(Text(plain(row), style="dim strike" if one.withdrawal else ""), soft_wrap=True)
        if one.withdrawal:
            console.print(Text(plain(f"              {_withdrawn(one)}"), style="dim"), soft_wrap=True)


def _withdrawn(version: "Version") -> str:
    from offsite.client.progress import clock

    gone = version.withdrawal
    return f"taken back by {gone.by} on {clock(gone.at)}: {gone.reason}" if gone else ""
