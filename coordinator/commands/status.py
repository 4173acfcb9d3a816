"""`offsite coordinator status`: which gateways there are, and what the runs wait for."""

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from offsite.coordinator.commands.options import Format


def status(
    home: Annotated[Path, typer.Option(help="The folder of a gateway on this machine.")] = Path("offsite-home"),
    format: Format = "text",
) -> None:
    """Show the gateways, which of them dispatches, and what each run that is not over waits for.

    Exit code 9 where no gateway dispatches. It asks the journal, so it works while no gateway is up.
    """
    from offsite.coordinator.home import Home
    from offsite.protos.errors import NotFoundError, UnreachableError

    root = home.resolve()
    if not (at := Home(root, root)).begun:
        raise NotFoundError(f"{root}: not a coordinator's folder: it has no journal; name one with --home")
    with closing(at.journal()) as journal:
        leader, here, runs = journal.leader(), journal.gateways(), journal.live()
    gateways = [
        {
            **{"name": row.name, "address": row.address, "version": row.version},
            **{"started_at": row.started_at, "seen_at": row.seen_at},
            "dispatches": leader is not None and row.name == leader.name,
        }
        for row in here
    ]
    if format == "json":
        unfinished = [{"id": run.id, "state": run.state, "note": run.note} for run in runs]
        print(json.dumps({"gateways": gateways, "runs": unfinished}, indent=2))
    else:
        for one in gateways:
            silent = time.time() - one["seen_at"]  # one that was killed is here for some seconds more
            role = "dispatches" if one["dispatches"] else "stands by"
            contact = f"heard {silent:.0f} s ago, offsite {one['version']}"
            print(f"gateway {one['name']} at {one['address']}: {role}, {contact}")
        for run in runs:
            print(f"run {run.id}: {run.state}{': ' * bool(run.note)}{run.note}")
        if not runs:
            print("no run is under way")
    if not any(one["dispatches"] for one in gateways):
        raise UnreachableError("no gateway dispatches the runs: they wait; `offsite coordinator up` starts one")
