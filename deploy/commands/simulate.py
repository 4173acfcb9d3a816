"""`offsite simulate`: a run with virtual sites, on this machine or the machines of a Ray cluster."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(add_completion=False)


@app.command()
def simulate(
    spec: Annotated[Path, typer.Argument(help="The run in TOML, as an owner may submit it; see docs/run.toml.")],
    data: Annotated[
        Path, typer.Option(help="Examples to cut into those of the sites; without --sites a folder with one per site.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the report.")] = Path("offsite-simulation"),
    sites: Annotated[int | None, typer.Option(min=1, help="How many virtual sites.")] = None,
    partition: Annotated[
        str,
        typer.Option(
            help="How the data is cut: iid, iid(rows=16), dirichlet(alpha=0.5), "
            'dirichlet(alpha=0.5,column="label"), length, key(column="author").'
        ),
    ] = "iid",
    policy: Annotated[Path | None, typer.Option(help="The policy of every site. (default: what is safe)")] = None,
    world: Annotated[
        Path | None, typer.Option(help="Speeds, presence and dropouts of sites in TOML; see docs/world.toml.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Sites that a round asks; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the partition, the sample and the world.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. (default: one a core)")] = None,
    train: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="What trains. (default: what a site's trainer does)")
    ] = "",
    start: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The --out of a simulation that is over, to go on from.")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="A field of the run, NAME=VALUE, such as rounds=5; a choice's value can be a recipe."),
    ] = None,
    ray_address: Annotated[
        str, typer.Option(help="The head of a Ray cluster that this machine is in; the others train, too.")
    ] = "",
    ray_token: Annotated[
        Path | None,
        typer.Option(help="The file with its token. (default: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)"),
    ] = None,
    format: Annotated[Literal["text", "json"], typer.Option(help="For people, or JSON lines for programs.")] = "text",
) -> None:
    """Do a run with virtual sites, through the code of a live one, and report.

    What is left out are the sockets, the certificates and a process for each site. Stopped and started again with the
    same arguments, it goes on after the last round that was done.
    """
    from rich.console import Console

    from offsite.client.figures import table
    from offsite.client.site.policy import Policy
    from offsite.deploy.simulation import simulate as work
    from offsite.deploy.simulation.progress import Progress
    from offsite.deploy.simulation.world import World
    from offsite.protos.assignments import assign
    from offsite.protos.documents import parse, read_toml
    from offsite.protos.recipes import parse_one
    from offsite.protos.spec import RunSpec

    document = parse(RunSpec, assign(set or [], read_toml(spec), RunSpec), where=str(spec))

    def emit(event: str, **about: Any) -> None:
        print(json.dumps({"event": event, **about}), flush=True)

    console = Console(highlight=False, quiet=format == "json")
    more: dict[str, Any] = {"train": train} if train else {}
    with Progress(console, rounds=document.rounds) as progress:
        result = work.simulate(
            document,
            data=data,
            out=out,
            sites=sites,
            partition=parse_one(partition),
            policy=Policy.load(policy) if policy else None,
            world=World.load(world) if world else None,
            sample=sample,
            seed=seed,
            workers=workers,
            start=start,
            tell=progress.tell,
            begin=progress.begin,
            ray_address=ray_address,
            ray_token=ray_token,
            note=progress.note if format == "text" else lambda words: emit("note", message=words),
            **more,
        )
    if format == "json":
        emit("report", **result.report)
        return
    console.print(table(result.report))
    for line in progress.lines(result.report["simulation"]):
        console.print(line, soft_wrap=True)
    console.print(
        f"adapter: {result.adapter}   report: {out / 'report.html'}, {out / 'report.json'}, {out / 'clock.svg'}"
    )
