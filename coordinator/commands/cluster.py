"""`offsite cluster`: several machines as one, for the steps of runs."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.coordinator.commands.options import Format
from offsite.coordinator.commands.sizes import size

if TYPE_CHECKING:
    from offsite.coordinator.cluster.view import Demand, View
    from offsite.protos.addresses import Address

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Have several machines of the owner's do the steps of runs."
)

Home_ = Annotated[Path, typer.Option("--home", help="This machine's folder for its place in a cluster.")]
Token = Annotated[
    Path | None,
    typer.Option(
        "--token",
        help="The file with the cluster's token. (default: what this machine's head has made, or joined with; else "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)",
    ),
]
HOME = Path("offsite-cluster")


@app.command()
def up(
    listen: Annotated[
        str, typer.Option(help="ADDRESS[:PORT] of this machine on the cluster's network: its own, and its first port.")
    ] = "",
    join: Annotated[str, typer.Option(help="ADDRESS[:PORT] of the head to join; without it, this is the head.")] = "",
    token: Token = None,
    home: Home_ = HOME,
    cpus: Annotated[int | None, typer.Option(min=0, help="Cores for steps. (default: all)")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs for steps. (default: all)")] = None,
    memory: Annotated[str, typer.Option(help="Memory for steps, such as 16GB. (default: what Ray finds free)")] = "",
    format: Format = "text",
) -> None:
    """Begin a cluster on this machine, or join one, and stay in it until interrupted or `offsite cluster down`."""
    from offsite.coordinator.cluster.member import PORT, PORTS, Member, own
    from offsite.protos.addresses import Address
    from offsite.protos.errors import InputError

    os.umask(0o077)
    if not (listen or join):
        raise InputError("name this machine's address on the cluster's network with --listen, or a head with --join")
    head = _address(join) if join else _address(listen)
    if head.loopback:
        raise InputError(
            f"{head}: no other machine reaches a loopback address; a single machine needs no cluster: `offsite "
            "coordinator up` starts what it needs"
        )
    address = _address(listen) if listen else Address(own(head), PORT)
    member = Member(
        home.resolve(), address, head, cpus=cpus, gpus=gpus, memory=size(memory, "--memory") if memory else None
    )

    def ready(view: "View") -> None:
        if format == "json":
            print(json.dumps({"event": "ready", "address": str(head), "machine": address.host}), flush=True)
            return
        if join:
            print(f"{address.host} is in the cluster at {head}, of {sum(one.alive for one in view.machines)} machines")
        else:
            print(f"a cluster is ready, with its head here at {head}; copy {token or home / 'token'} to each machine")
            print(f"that is to join it, and run there: offsite cluster up --join {head} --token FILE")
        print(
            f"Ray listens on all addresses of this machine, behind the token: let its firewall open ports "
            f"{address.port} to {address.port + PORTS - 1} to the cluster's machines alone. Ctrl-C leaves the cluster.",
            flush=True,
        )

    member.up(token.resolve() if token else None, ready)
    if format == "json":
        print(json.dumps({"event": "left", "address": str(head), "machine": address.host}))
    else:
        print(f"{address.host} has left the cluster at {head}")


@app.command()
def status(
    address: Annotated[str, typer.Option(help="ADDRESS[:PORT] of the head. (default: this machine's)")] = "",
    token: Token = None,
    home: Home_ = HOME,
    format: Format = "text",
) -> None:
    """Show a cluster's machines, what runs on them, and what waits for what."""
    from offsite.coordinator.cluster.admission import admitted
    from offsite.coordinator.cluster.looking import look
    from offsite.coordinator.cluster.member import membership
    from offsite.protos.documents import to_plain

    if address:
        place = str(_address(address))
    else:
        mine = membership(home.resolve())
        place, token = mine.head, token or (Path(mine.token) if mine.token else None)
    view = look(place, admitted(token))
    if format == "json":
        print(json.dumps(to_plain(view)))
    else:
        _show(view)


@app.command()
def down(home: Home_ = HOME, format: Format = "text") -> None:
    """Take this machine out of its cluster; on the head, the cluster ends."""
    from offsite.coordinator.cluster.member import down
    from offsite.protos.output import say

    left = down(home.resolve())
    say(format, {"head": left.head}, f"this machine has left the cluster at {left.head}")


def _address(text: str) -> "Address":
    """Read ADDRESS[:PORT]."""
    from offsite.coordinator.cluster.member import PORT
    from offsite.protos.addresses import parse

    alone = text.startswith("[") and text.endswith("]") or text.count(":") == 0
    return parse(f"{text}:{PORT}" if alone else text)


def _show(view: "View") -> None:
    from rich.console import Console
    from rich.table import Table

    from offsite.coordinator.cluster.view import label
    from offsite.protos.documents import plain

    console = Console(highlight=False)
    table = Table(title=plain(f"cluster at {view.address}: Ray {view.ray}, Python {view.python}"), title_justify="left")
    for column in ("machine", "state", "CPU", "GPU", "memory", "offsite"):
        table.add_column(column)
    for machine in view.machines:
        name = f"{machine.address} (head)" if machine.head else machine.address
        state = "alive" if machine.alive else "gone"
        used = [_used(machine.resources, machine.free, kind) for kind in ("CPU", "GPU", "memory")]
        table.add_row(*(plain(cell) for cell in (name, state, *used, machine.offsite or "not told")))
    console.print(table)
    if view.mismatch:
        console.print(plain(view.mismatch))
    for machine in view.machines:
        if not machine.alive:
            console.print(plain(f"{machine.address} is gone: {machine.gone}"))
        elif not machine.fit:
            has = f"Offsite {machine.offsite}" if machine.offsite else "no Offsite that it tells of"
            console.print(plain(f"{machine.address} has {has}, and this machine {label()}: no step is done there"))
    for actor in view.actors:
        where = f"on {actor.address}" if actor.address else "on no machine yet"
        console.print(plain(f"{actor.name}  {actor.state} {where}"))
    for demand in view.waiting:
        console.print(plain(_waiting(demand, view)))


def _used(resources: dict[str, float], free: dict[str, float], kind: str) -> str:
    """Write how much of a resource is taken, and of how much."""
    if kind not in resources:
        return ""
    scale, unit = (1e9, " GB") if kind == "memory" else (1, "")
    return f"{(resources[kind] - free.get(kind, 0)) / scale:.3g} of {resources[kind] / scale:.3g}{unit}"


def _waiting(demand: "Demand", view: "View") -> str:
    needs = [
        f"{much / 1e9:.3g} GB" if kind == "memory" else f"{much:g} {kind}" for kind, much in demand.resources.items()
    ]
    needs += [f"{name} {value}" for name, value in demand.labels.items()]
    steps = "1 step waits" if demand.count == 1 else f"{demand.count} steps wait"
    hope = "" if any(demand.fits(machine) for machine in view.machines) else "; no machine of the cluster has that"
    return f"{steps} for {', '.join(needs) or 'a machine'}{hope}"
