"""`offsite coordinator`: run the owner's end."""

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run the coordinator, the model owner's end.")


@app.callback()
def _group() -> None:
    """Keep `up` a subcommand."""


@app.command()
def up(
    identity: Annotated[Path, typer.Option(help="The coordinator's kit, from `offsite pki issue --role coordinator`.")],
    home: Annotated[Path, typer.Option(help="Folder of the journal and the blobs; made if missing.")] = Path(
        "offsite-home"
    ),
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = "127.0.0.1:8443",
    executor: Annotated[Literal["ray", "threads"], typer.Option(help="Where supervisors and their steps run.")] = "ray",
    ray_address: Annotated[str, typer.Option(help="A Ray cluster to join; its nodes must see HOME.")] = "",
    places: Annotated[int, typer.Option("--runs", min=1, help="Runs worked on at once; others stay queued.")] = 8,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a step; 0 takes all.")] = 0,
    format: Annotated[Literal["text", "json"], typer.Option(help="Text or JSON, once it is ready.")] = "text",
) -> None:
    """Serve sites and people until interrupted; unfinished runs go on where they were."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from offsite.coordinator.executor import Executor, InProcess
    from offsite.coordinator.home import Home
    from offsite.coordinator.server import run
    from offsite.protos.addresses import Address, parse

    address = parse(listen, listening=True)

    def make(home: Home) -> Executor:
        if executor == "threads":
            return InProcess(home)
        from offsite.coordinator.cluster import OnRay

        return OnRay(home, address=ray_address or None, threads=threads)

    def ready(port: int) -> None:
        here = Address(address.host, port)
        if format == "json":
            print(json.dumps({"event": "ready", "address": str(here)}), flush=True)
        else:
            print(f"coordinator ready on {here}; home {home}, steps on {executor}. Ctrl-C stops it.", flush=True)

    run(Home(home.resolve(), identity.resolve()), address, make, ready=ready, places=places)
