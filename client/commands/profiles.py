"""`offsite identity profile`: keep under a name which coordinator one speaks with, and by which kit."""

from pathlib import Path
from typing import Annotated

import typer

from offsite.client.commands.options import Format

app = typer.Typer(no_args_is_help=True, help="Keep under a name with whom you speak, and by which kit.")

Named = Annotated[str, typer.Argument(metavar="NAME", help="The profile.")]


@app.command()
def add(
    name: Named,
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator, or of several gateways.")] = "",
    identity: Annotated[Path | None, typer.Option(help="The folder of the kit.")] = None,
    use: Annotated[bool, typer.Option("--use", help="Make it the default, as the first is anyway.")] = False,
    format: Format = "text",
) -> None:
    """Add a profile, or write one of this name anew."""
    from dataclasses import replace

    from offsite.client import profiles
    from offsite.protos import addresses
    from offsite.protos.documents import parse
    from offsite.protos.output import say

    if coordinator:
        addresses.parse_all(coordinator)
    given = {"coordinator": coordinator, "identity": profiles.absolute(identity) if identity else ""}
    known = profiles.load()
    new = parse(profiles.Profiles, {"profile": {name: given}}, where=name)
    default = name if use or known.default is None else known.default
    replace(known, default=default, profile=known.profile | new.profile).save()
    line = f"{profiles.file()}: profile {name}{', the default' if default == name else ''}"
    say(format, {"name": name, **given, "default": default == name}, line)


@app.command()
@app.command("list", hidden=True)
def ls(format: Format = "text") -> None:
    """List the profiles; the default is marked."""
    from offsite.client import profiles
    from offsite.protos.documents import to_plain
    from offsite.protos.output import say

    known = profiles.load()
    if format == "json":
        rows = [
            {"name": name, **to_plain(one), "default": name == known.default} for name, one in known.profile.items()
        ]
        say(format, rows)
        return
    if not known.profile:
        print("no profiles yet; `offsite identity profile add` makes one")
    for name, one in known.profile.items():
        print(f"{'*' if name == known.default else ' '} {name}  {one.coordinator or '-'}  {one.identity or '-'}")


@app.command()
def use(name: Named, format: Format = "text") -> None:
    """Make a profile the default, for whoever names none."""
    from dataclasses import replace

    from offsite.client import profiles
    from offsite.protos.output import say

    known = profiles.load()
    known.of(name)
    replace(known, default=name).save()
    say(format, {"name": name, "default": True})


@app.command()
def remove(name: Named, format: Format = "text") -> None:
    """Remove a profile; its kit stays where it is."""
    from dataclasses import replace

    from offsite.client import profiles
    from offsite.protos.output import say

    known = profiles.load()
    known.of(name)
    rest = {other: one for other, one in known.profile.items() if other != name}
    replace(known, default=None if known.default == name else known.default, profile=rest).save()
    say(format, {"name": name, "removed": True})
