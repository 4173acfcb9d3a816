"""`offsite pki`: say who takes part."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Say who takes part: certificates for the coordinator, the sites and the people.",
    no_args_is_help=True,
    add_completion=False,
)

COPIED = (
    "A coordinator that runs from a copied kit needs the new crl.pem in it; it reads the file again by itself, "
    "and warns 14 days before the list ends."
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")]
RoleName = Literal["coordinator", "site", "owner", "researcher", "auditor"]


@app.command()
def init(
    folder: Folder,
    *,
    name: Annotated[str, typer.Option(help="What the authority is called in its certificate.")] = "offsite",
    days: Annotated[int, typer.Option(help="Days until the authority expires.")] = 3650,
) -> None:
    """Make a new authority and the model owner's signing key."""
    from offsite.protos.security.pki import Authority

    Authority.create(folder, name=name, days=days)
    typer.echo(f"Made the authority {name!r} in {folder}.")
    typer.echo(
        "Keep the folder on the model owner's machine and back it up: ca.key admits people, owner.key signs for you."
    )
    typer.echo(f"Next: offsite pki issue {folder} --role coordinator NAME --host HOST")


@app.command()
def issue(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who the kit is for.")],
    *,
    role: Annotated[
        RoleName, typer.Option(help="What they may do: owners all, researchers their own runs, auditors look.")
    ],
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address the coordinator is reached at; repeatable.")
    ] = None,
    days: Annotated[int, typer.Option(help="Days until the certificate expires.")] = 365,
) -> None:
    """Issue a kit: a folder with all that one party needs to prove who it is."""
    from offsite.protos.security.identity import Identity
    from offsite.protos.security.pki import Authority

    kit = Authority.open(folder).issue(role, name, hosts=tuple(host or ()), days=days)
    typer.echo(f"Wrote the kit of {role} {name!r} to {kit}; it is valid until {Identity.load(kit).expires:%Y-%m-%d}.")
    if role == "coordinator":
        if not host:
            typer.echo("It holds for connections from the same machine only; name other hosts with --host.")
        typer.echo(
            "Copy the whole folder to the machine that runs `offsite coordinator up`. Secret: tls.key and owner.key."
        )
    else:
        typer.echo(f"Hand the whole folder to {name} over a channel you trust, and to nobody else. Secret: tls.key.")
        typer.echo(
            f"A coordinator that runs from a copied kit lets {name} in once it has the new {folder / 'crl.pem'}."
        )


@app.command()
def revoke(
    folder: Folder, name: Annotated[str, typer.Argument(metavar="NAME", help="Whose certificate no longer holds.")]
) -> None:
    """Revoke a certificate: coordinators refuse it from the next call on.

    Where it is a coordinator's, hand the new crl.pem to the sites and people: each client refuses it once the file is
    in its kit. A coordinator's kit holds the model owner's signing key, too: where one leaked, make a new authority.
    """
    from offsite.protos.security.pki import Authority

    written = Authority.open(folder).revoke(name)
    typer.echo(f"Revoked the certificate of {name!r}. Wrote {written[0]} and {len(written) - 1} kits' crl.pem.")
    typer.echo(COPIED)


@app.command()
def refresh(
    folder: Folder,
    *,
    days: Annotated[int, typer.Option(help="Days for which the list holds.")] = 90,
) -> None:
    """Renew crl.pem, the list of the certificates that hold; past its end nobody is let in.

    Every `issue` and `revoke` renews it as well.
    """
    from offsite.protos.security.pki import Authority

    written = Authority.open(folder).refresh(days=days)
    typer.echo(f"Wrote {written[0]} and {len(written) - 1} kits' crl.pem; it holds for {days} days.")
    typer.echo(COPIED)


@app.command("list")
def show(
    folder: Folder,
    *,
    format: Annotated[Literal["table", "json"], typer.Option(help="How to print it.")] = "table",
) -> None:
    """List all certificates ever issued, oldest first."""
    from rich.console import Console
    from rich.table import Table

    from offsite.protos.documents import to_plain
    from offsite.protos.security.pki import Authority

    entries = Authority.open(folder).entries()
    if format == "json":
        typer.echo(json.dumps([{**to_plain(entry), "status": entry.status} for entry in entries], indent=2))
        return
    if not entries:
        typer.echo(f"no certificates yet; `offsite pki issue {folder} --role site NAME` makes one")
        return
    table = Table("name", "role", "status", "expires", box=None)
    for entry in entries:
        table.add_row(entry.name, entry.role, entry.status, f"{entry.expires:%Y-%m-%d}")
    Console().print(table)
