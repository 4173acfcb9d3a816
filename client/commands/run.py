"""`offsite run`: submit federated runs and look after them."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from offsite.client.commands.new import new
from offsite.client.commands.options import Coordinator, Format, Kit
from offsite.protos.output import as_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offsite.client.answers import Event

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Submit federated runs and look after them.")
app.command()(new)

RESTART_S = 120.0  # how long a command that waits for a run waits for a coordinator that is being restarted

Id = Annotated[str, typer.Argument(help="The run's id.")]


@app.command()
def submit(
    coordinator: Coordinator,
    identity: Kit,
    spec: Annotated[Path | None, typer.Argument(help="The run in TOML; see docs/run.toml.")] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="A field, NAME=VALUE, such as training.steps=20; a choice's value can be a recipe."),
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="RUN[:ROUND]", help="The run, or its round, whose version to go on from.")
    ] = None,
    token: Annotated[str, typer.Option(help="Repeating a submission with the same token gives the same run.")] = "",
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Also submit a run of each site alone, to compare with.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run until it ends.")] = False,
    format: Format = "text",
) -> None:
    """Submit a run and print its id."""
    from offsite.client.beside import isolated as alone
    from offsite.client.session import connect
    from offsite.protos.assignments import assign
    from offsite.protos.documents import parse, read_toml
    from offsite.protos.spec import RunSpec

    document = parse(RunSpec, assign(set or [], read_toml(spec) if spec else {}, RunSpec), where=str(spec or "run"))
    with connect(coordinator, identity=identity) as session:
        run = session.submit(document, token=token, start=start)
        others = alone(session, run.spec, token=token) if isolated else {}
        if format == "json":
            ids = {"isolated": {name: one.id for name, one in others.items()}} if isolated else {}
            print(as_json({"id": run.id, "state": run.state} | ids), flush=True)
        else:
            print(run.id, *(f"{one.id}  {name}" for name, one in others.items()), sep="\n", flush=True)
        if watch:
            _follow(run, format)


@app.command()
@app.command("list", hidden=True)
def ls(
    coordinator: Coordinator,
    identity: Kit,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the newest ones. (default: all)")] = None,
    format: Format = "text",
) -> None:
    """List runs, oldest first, each with why it failed."""
    from rich.console import Console
    from rich.text import Text

    from offsite.client.progress import clock
    from offsite.client.session import connect
    from offsite.protos.documents import plain

    with connect(coordinator, identity=identity) as session:
        runs = session.runs(limit=limit)
    if format == "json":
        print(as_json([_plain(run, brief=True) for run in runs], indent=2))
        return
    if not runs:
        print("no runs yet; `offsite run submit` makes one")
        return
    console = Console(highlight=False)
    console.print(f"{'id':8}  {'state':9}  {'round':>7}  {'submitted':19}  {'by':10}  name")
    for run in runs:
        status = run.status
        when, rounds = clock(status.submitted_at), f"{status.round}/{status.rounds}"
        row = f"{run.id:8}  {run.state:9}  {rounds:>7}  {when:19}  {status.owner:10}  {status.name}"
        console.print(Text(plain(row)), soft_wrap=True)
        if why := run.error or run.note:  # on a line of its own, so that the terminal's whole width is for it
            console.print(Text(f"          {plain(why)}", style="dim"), soft_wrap=True)


@app.command()
def show(id: Id, coordinator: Coordinator, identity: Kit, format: Format = "text") -> None:
    """Show one run: its state, its figures, its files."""
    from rich.console import Console
    from rich.text import Text

    from offsite.client.figures import table
    from offsite.client.session import connect
    from offsite.protos.documents import plain, to_plain

    with connect(coordinator, identity=identity) as session:
        run = session.run(id)
    if format == "json":
        print(as_json(_plain(run) | {"spec": to_plain(run.spec), "report": run.report}, indent=2))
        return
    console = Console()
    status = run.status
    head = f"run {run.id} {status.name}".rstrip()
    why = f": {run.error or run.note}" if run.error or run.note else ""
    console.print(Text(plain(f"{head}: {run.state}, round {status.round} of {status.rounds}{why}")), soft_wrap=True)
    if run.report:
        console.print(table(run.report))
    for artifact in status.artifacts:
        console.print(Text(plain(f"{artifact.name}  {artifact.size / 1e6:.2f} MB  {artifact.digest}")), soft_wrap=True)
    if not status.artifacts:
        console.print("no files yet: a run publishes them when it is completed")


@app.command()
def watch(
    id: Id,
    coordinator: Coordinator,
    identity: Kit,
    log: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND:PLACE", help="Also write figures to tensorboard:DIR, mlflow:URI or otlp:URL."),
    ] = None,
    format: Format = "text",
) -> None:
    """Follow a run until it ends; exit code 10 if it failed or was cancelled."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity, patience_s=RESTART_S) as session:
        _follow(session.run(id), format, log or ())


@app.command()
def log(
    id: Id,
    coordinator: Coordinator,
    identity: Kit,
    stream: Annotated[bool, typer.Option("--stream", help="Go on with what comes, until the run ends.")] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Only so many of the newest lines. (default: all)")] = None,
    format: Format = "text",
) -> None:
    """Print what happened in a run, a line for each event."""
    from offsite.client.progress import RunView, clock
    from offsite.client.session import connect

    with connect(coordinator, identity=identity, patience_s=RESTART_S) as session:
        run = session.run(id)
        view = RunView(run.spec)

        def line(event: "Event") -> str:
            if format == "json":
                return as_json(vars(event))
            said = view.take(event)
            return f"{clock(event.at)}  {said}" if said else ""

        past = run.events()
        lines = [written for event in past if (written := line(event))]
        print(*lines[len(lines) - tail if tail is not None and tail < len(lines) else 0 :], sep="\n", flush=True)
        for event in run.watch(after=past[-1].seq if past else 0) if stream else ():
            if written := line(event):
                print(written, flush=True)


@app.command()
def wait(id: Id, coordinator: Coordinator, identity: Kit, format: Format = "text") -> None:
    """Wait for the end of a run and print how it ended; exit code 10 if it failed or was cancelled."""
    from offsite.client.session import connect
    from offsite.protos.errors import RunError

    with connect(coordinator, identity=identity, patience_s=RESTART_S) as session:
        run = session.run(id)
        for _ in run.watch():
            pass
    say(format, _plain(run), f"run {run.id} is {run.state}")
    if run.state != "completed":
        raise RunError(f"run {run.id} {run.state}: {run.error}")


@app.command()
@app.command("cancel", hidden=True)
def stop(id: Id, coordinator: Coordinator, identity: Kit, format: Format = "text") -> None:
    """Stop a run, which is cancelled; sites stop at their next report. A run that is over stays as it ended."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity) as session:
        run = session.run(id).cancel()
    print(as_json(_plain(run)) if format == "json" else f"run {run.id} is {run.state}")


@app.command()
def eject(
    id: Id,
    site: Annotated[str, typer.Argument(help="The site's name.")],
    coordinator: Coordinator,
    identity: Kit,
    reason: Annotated[str, typer.Option(help="Why; it stays in the run's audit trail, with your name.")],
    format: Format = "text",
) -> None:
    """Take a site out of a run, which goes on without it; what of its updates is in earlier rounds stays there."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity) as session:
        run = session.run(id).eject(site, reason=reason)
    print(as_json(_plain(run)) if format == "json" else f"run {run.id} goes on without {site}")


@app.command()
def withdraw(
    id: Id,
    site: Annotated[str, typer.Argument(help="The site that is taken out.")],
    coordinator: Coordinator,
    identity: Kit,
    reason: Annotated[str, typer.Option(help="Why; it stays with what is taken back, and in the certificate.")],
    watch: Annotated[bool, typer.Option("--watch", help="Follow the new run until it ends.")] = False,
    format: Format = "text",
) -> None:
    """Take a site out of a run that is over: do it again without the site, and print the id of the run that does."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity) as session:
        run = session.run(id).withdraw(site, reason=reason)
        print(as_json({"id": run.id, "state": run.state}) if format == "json" else run.id, flush=True)
        if watch:
            _follow(run, format)


@app.command()
def extend(
    id: Id,
    coordinator: Coordinator,
    identity: Kit,
    rounds: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many more.")],
    from_: Annotated[
        int,
        typer.Option(
            "--from", metavar="ROUND", min=0, max=1_000_000, help="Whose version to go on from; 0: the newest."
        ),
    ] = 0,
    token: Annotated[str, typer.Option(help="Repeating it with the same token gives the same run.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Follow the new run until it ends.")] = False,
    format: Format = "text",
) -> None:
    """Submit a run of more rounds, which ends with the bytes of a run of that length, and print its id."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity) as session:
        run = session.run(id).extend(rounds, after=from_, token=token)
        print(as_json({"id": run.id, "state": run.state}) if format == "json" else run.id, flush=True)
        if watch:
            _follow(run, format)


@app.command()
@app.command("fetch", hidden=True)
def pull(
    id: Id,
    out: Annotated[Path, typer.Argument(help="Folder for the files.")],
    coordinator: Coordinator,
    identity: Kit,
    format: Format = "text",
) -> None:
    """Wait for a run and download its files: the adapter, a model card, and the merged model if it was asked for."""
    from offsite.client.session import connect

    with connect(coordinator, identity=identity, patience_s=RESTART_S) as session:
        run = session.run(id)
        folder = run.result(out)
    files = [artifact.name for artifact in run.status.artifacts]
    say(format, {"id": run.id, "folder": str(folder), "files": files}, str(folder))


@app.command()
def compose(
    out: Annotated[Path, typer.Argument(help="A new folder for what they make together.")],
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of adapters that were fetched, of one base.")
    ],
    without: Annotated[
        list[Path] | None, typer.Option(metavar="ADAPTER", help="The folder of one to take off again; may be repeated.")
    ] = None,
    format: Format = "text",
) -> None:
    """Add up published adapters of single entries (lt-sft, spiel, sara), such as those of a language and of a task."""
    from offsite.client.adapters import compose as add_up

    folder = str(add_up(out, adapters, without=without or []))
    parts = {"adapters": [*map(str, adapters)], "without": [*map(str, without or [])]}
    say(format, {"folder": folder, **parts}, folder)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter that was fetched; for gguf also of a merged model.")
    ],
    form: Annotated[
        Literal["vllm", "gguf", "merged"],
        typer.Option("--as", help="vllm: peft's format at one rank; gguf: for llama.cpp; merged: safetensors."),
    ] = "vllm",
    base: Annotated[Path | None, typer.Option(help="Folder of the base, for an adapter as gguf or merged.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Of vllm and gguf; 0: the adapter's largest, losing nothing.")] = 0,
    format: Format = "text",
) -> None:
    """Write a published adapter in the form that a server takes."""
    from offsite.client.adapters import export as write

    lost = write(out, adapter, form, base=base, rank=rank)
    less = f" of rank {rank}, which leaves out {lost:.2%} of its change" if lost > 1e-6 else ""
    say(format, {"folder": str(out), "form": form, "rank": rank, "lost": lost}, f"{out}: {form}{less}")


@app.command()
def sites(coordinator: Coordinator, identity: Kit, format: Format = "text") -> None:
    """List the enrolled sites and when each was last heard."""
    from offsite.client.session import connect
    from offsite.protos.documents import plain

    with connect(coordinator, identity=identity) as session:
        enrolled = session.sites()
    if format == "json":
        print(as_json([asdict(site) for site in enrolled]))
        return
    if not enrolled:
        print("no sites yet; one enrols with `offsite site join`")
    for site in enrolled:
        contact = f"heard {time.time() - site.seen_at:.0f} s ago"
        print(plain(f"{site.name}  {site.examples} examples  {contact}  offsite {site.version}"))


def _follow(run: Any, format: str, targets: "Sequence[str]" = ()) -> None:
    from rich.console import Console

    from offsite.client.figures import table
    from offsite.client.loggers import logged
    from offsite.client.progress import follow
    from offsite.protos.errors import RunError

    console = Console()
    follow(logged(run, run.watch(), targets), run.spec, console=console, format=format)
    if run.state != "completed":
        raise RunError(f"run {run.id} {run.state}: {run.error}")
    if format == "text":
        console.print(table(run.report))


def _plain(run: Any, *, brief: bool = False) -> dict[str, Any]:
    status = asdict(run.status)
    return {name: value for name, value in status.items() if not (brief and name == "artifacts")}
