"""`offsite pki`: say who takes part."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from offsite.coordinator.commands.options import Format

app = typer.Typer(
    help="Say who takes part: certificates for the coordinator, the sites and the people.",
    no_args_is_help=True,
    add_completion=False,
)

COPIED = (
    "A coordinator that runs from a copied kit, without --authority, needs the new crl.pem in it; it reads the file "
    "again by itself, tells the others that share its journal, and warns 14 days before the list ends."
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")]
RoleName = Literal["coordinator", "site", "owner", "researcher", "auditor"]


@app.command()
def init(
    folder: Folder,
    *,
    name: Annotated[str, typer.Option(help="What the authority is called in its certificate.")] = "offsite",
    days: Annotated[int, typer.Option(help="Days until the authority expires.")] = 3650,
    format: Format = "text",
) -> None:
    """Make a new authority and the model owner's signing key."""
    from offsite.protos.output import say
    from offsite.protos.security.pki import Authority

    Authority.create(folder, name=name, days=days)
    say(
        format,
        {"name": name, "folder": str(folder)},
        f"Made the authority {name!r} in {folder}.",
        "Keep the folder on the model owner's machine and back it up: ca.key admits people, owner.key signs for you.",
        f"Next: offsite pki issue {folder} --role coordinator NAME --host HOST",
    )


@app.command()
def token(
    folder: Folder,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Who the tokens are for.")] = None,
    *,
    role: Annotated[Literal["site", "owner", "researcher", "auditor"], typer.Option(help="What they may do.")],
    address: Annotated[str, typer.Option(help="HOST:PORT at which they reach the coordinator.")],
    hours: Annotated[int, typer.Option(help="Hours until the token expires.")] = 24,
    days: Annotated[int, typer.Option(help="Days that their certificates hold; each is renewed in time.")] = 30,
    names_file: Annotated[
        typer.FileText | None, typer.Option("--names", help="A file of more names, one a line; - reads the input.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="A folder for the tokens, NAME.token each; else the one is printed.")
    ] = None,
    format: Format = "text",
) -> None:
    """Make a token: one line by which one party joins, once, with a private key that it makes itself.

    It is a secret until it is used. A new token for a name ends the one before. Of many, as with --names, all are made
    at once, or none.
    """
    from offsite.protos.errors import InputError
    from offsite.protos.output import say
    from offsite.protos.security.kit import write
    from offsite.protos.security.pki import Authority

    everybody = [*(names or ()), *(line for line in map(str.strip, names_file or ()) if line)]
    if not everybody:
        raise InputError("nobody is named; name who the token is for, or a file of names with --names")
    if len(everybody) > 1 and to is None:
        raise InputError(f"{len(everybody)} tokens are to be made; name a folder for them with --to")
    made = Authority.open(folder).tokens(role, everybody, address=address, hours=hours, days=days)
    command = "site" if role == "site" else "identity"
    end = f"over a channel you trust, before {made[0].expires:%Y-%m-%d %H:%M} UTC. There: offsite {command} enrol"
    rows = [{"name": one.name, "role": role, "expires": one.expires.isoformat()} for one in made]
    if to is None:
        say(format, [rows[0] | {"token": str(made[0])}], str(made[0]))
        typer.echo(f"Hand this line to {everybody[0]} {end} - --identity {everybody[0]}", err=True)
    else:
        for one in made:
            write(to / f"{one.name}.token", f"{one}\n".encode(), secret=True)
        say(
            format,
            [row | {"file": str(to / f"{row['name']}.token")} for row in rows],
            f"Hand each of {len(made)} files in {to} to whom it is named after, {end} NAME.token --identity NAME",
        )
    typer.echo(f"A coordinator that does not see {folder} lets them in once it has the new crl.pem.", err=True)


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
    format: Format = "text",
) -> None:
    """Issue a kit: a folder with all that one party needs to prove who it is."""
    from offsite.protos.output import say
    from offsite.protos.security.identity import Identity
    from offsite.protos.security.pki import Authority

    kit = Identity.load(Authority.open(folder).issue(role, name, hosts=tuple(host or ()), days=days))
    lines = [f"Wrote the kit of {role} {name!r} to {kit.folder}; it is valid until {kit.expires:%Y-%m-%d}."]
    if role == "coordinator":
        if not host:
            lines.append("It holds for connections from the same machine only; name other hosts with --host.")
        lines.append(
            "Copy the whole folder to the machine that runs `offsite coordinator up`. Secret: tls.key and owner.key."
        )
    else:
        lines += [
            f"Hand the whole folder to {name} over a channel you trust, and to nobody else. Secret: tls.key.",
            f"A coordinator that does not see {folder} lets {name} in once its kit has the new {folder / 'crl.pem'}.",
        ]
    say(format, kit.about, *lines)


@app.command()
def renew(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose kit in the authority's folder is to be renewed.")],
    *,
    days: Annotated[int, typer.Option(help="Days until the new certificate expires.")] = 365,
    format: Format = "text",
) -> None:
    """Write a kit again, with a new key and certificate; the one before holds until it ends.

    That is for kits of `issue`, such as a coordinator's: who joined by a token renews by itself.
    """
    from offsite.protos.output import say
    from offsite.protos.security.identity import Identity
    from offsite.protos.security.pki import Authority

    kit = Identity.load(Authority.open(folder).renew(name, days=days))
    say(
        format,
        kit.about,
        f"Wrote the kit {kit.folder} anew; it is valid until {kit.expires:%Y-%m-%d}.",
        "Copy it to where it is used: a coordinator shows it from the next connection on, without a restart.",
    )


@app.command()
def revoke(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose certificate no longer holds.")],
    format: Format = "text",
) -> None:
    """Revoke all that a name has, its open tokens too: coordinators refuse it from the next call on.

    Where it is a coordinator's, hand the new crl.pem to the sites and people: each client refuses it once the file is
    in its kit. A coordinator's kit holds the model owner's signing key, too: where one leaked, make a new authority.
    """
    from offsite.protos.output import say
    from offsite.protos.security.pki import Authority

    written = Authority.open(folder).revoke(name)
    said = f"Revoked what {name!r} has. Wrote {written[0]} and {len(written) - 1} kits' crl.pem."
    say(format, {"name": name, "written": [*map(str, written)]}, said, COPIED)


@app.command()
def refresh(
    folder: Folder,
    *,
    days: Annotated[int, typer.Option(help="Days for which the list holds.")] = 90,
    format: Format = "text",
) -> None:
    """Renew crl.pem, the list of the certificates that hold; past its end nobody is let in.

    Every `issue` and `revoke` renews it as well.
    """
    from offsite.protos.output import say
    from offsite.protos.security.pki import Authority

    written = Authority.open(folder).refresh(days=days)
    said = f"Wrote {written[0]} and {len(written) - 1} kits' crl.pem; it holds for {days} days."
    say(format, {"days": days, "written": [*map(str, written)]}, said, COPIED)


@app.command()
@app.command("list", hidden=True)
def ls(
    folder: Folder,
    *,
    format: Format = "text",
) -> None:
    """List all certificates and tokens ever made, oldest first.

    One that a second key was refused for is marked: somebody else may hold it, so
    revoke the name.
    """
    from rich.console import Console
    from rich.table import Table

    from offsite.protos.documents import to_plain
    from offsite.protos.output import say
    from offsite.protos.security.index import Entry
    from offsite.protos.security.pki import Authority

    entries = Authority.open(folder).index().all
    if format == "json":
        kinds = ["certificate" if isinstance(entry, Entry) else "token" for entry in entries]
        rows = [
            {"kind": kind, **to_plain(entry), "status": entry.status}
            for kind, entry in zip(kinds, entries, strict=True)
        ]
        say(format, rows)
        return
    if not entries:
        typer.echo(f"no certificates yet; `offsite pki token {folder} --role site NAME` lets a site join")
        return
    table = Table("name", "role", "what", "status", "expires", "", box=None)
    for entry in entries:
        contested = f"second key refused {entry.contested_at:%Y-%m-%d}" if entry.contested_at else ""
        what = "certificate" if isinstance(entry, Entry) else "token"
        table.add_row(entry.name, entry.role, what, entry.status, f"{entry.expires:%Y-%m-%d}", contested)
    Console().print(table)
