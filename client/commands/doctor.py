"""`offsite doctor`: look whether a person's or a site's machine has what it needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.client.commands.options import Format

if TYPE_CHECKING:
    from offsite.protos.checks import Check

app = typer.Typer(add_completion=False)

PATIENCE_S = 5.0  # for a coordinator that does not answer


@app.command()
def doctor(
    coordinator: Annotated[
        str | None, typer.Option(envvar="OFFSITE_COORDINATOR", help="HOST:PORT. (default: the profile's)")
    ] = None,
    identity: Annotated[
        Path | None, typer.Option(envvar="OFFSITE_IDENTITY", help="The kit. (default: the profile's)")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="The policy file of a site.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its examples.")] = None,
    work: Annotated[Path, typer.Option(help="Where it works, and files are written.")] = Path(),
    disk: Annotated[float, typer.Option(min=0, help="GB that are to be free there.")] = 5.0,
    memory: Annotated[float, typer.Option(min=0, help="GB of memory that are wanted.")] = 2.0,
    format: Format = "text",
) -> None:
    """Check this machine, one line for each thing: ok, warn, or fail with what to do.

    What is named is looked at: a kit, a coordinator by a real handshake and a call, a policy and its data.
    The exit code is 0 unless something fails, and then the highest of what failed. At the owner's end: `offsite
    coordinator doctor`.
    """
    from offsite.client.profiles import setting
    from offsite.protos import checks

    coordinator = coordinator or setting("coordinator")
    identity = identity or (Path(kept) if (kept := setting("identity")) else None)
    code = checks.show(_checks(coordinator, identity, policy, data, work, disk, memory), form=format)
    raise typer.Exit(code)


def _checks(
    coordinator: str | None,
    identity: Path | None,
    policy: Path | None,
    data: Path | None,
    work: Path,
    disk: float,
    memory: float,
) -> Iterator["Check"]:
    from offsite.protos import checks

    site = policy is not None
    needed = ("torch", "transformers") if site else ()
    yield checks.check("versions", lambda: checks.versions("grpcio", *needed, beside=("torch", "deepspeed")))
    if identity is not None:
        yield checks.check("kit", lambda: checks.kit(identity, *(["site"] if site else [])))
        if coordinator:
            yield checks.check("coordinator", lambda: _answer(coordinator, identity))
    if policy is not None:
        yield checks.check("policy", lambda: _policy(policy))
        if data is not None:
            yield checks.check("data", lambda: _data(policy, data))
    yield checks.check("disk", lambda: checks.disk(work, least_gb=disk))
    yield checks.check("memory", lambda: checks.memory(least_gb=memory))
    if site:
        yield checks.check("gpu", checks.gpus)
        yield checks.check("compilation", checks.compilations)


def _answer(coordinator: str, identity: Path) -> str:
    """Shake hands, and ask what any member may."""
    from offsite.client.channel import Channel
    from offsite.client.membership import Membership
    from offsite.protos.security.certificates import MEMBERS
    from offsite.protos.security.identity import Identity
    from offsite.protos.security.revocation import list_number

    kit = Identity.load(identity, expect=MEMBERS)
    channel = Channel(coordinator, kit, patience_s=PATIENCE_S)
    try:
        Membership(channel, identity).revocations(list_number(identity))
        return f"{channel.target} answers {kit.role} {kit.name!r} over TLS 1.3"
    finally:
        channel.close()


def _policy(file: Path) -> str:
    from offsite.client.site.policy import Policy

    return f"{file}: {len(Policy.load(file).data)} folders of data"


def _data(file: Path, data: Path) -> str:
    """Read the rows as a task would; an error of ours says what is wrong with which."""
    from offsite.client.site.policy import Policy
    from offsite.emulator import objectives
    from offsite.protos.checks import Doubt
    from offsite.protos.errors import InputError

    rules: Any = Policy.load(file)
    rules.check_data(data)
    try:
        _, reading = objectives.survey(rules.source(data))
    except ValueError as error:
        raise InputError(str(error)) from None
    if reading.census.distinct < rules.min_rows:
        raise Doubt(
            f"{data}: {reading.census.distinct} distinct examples, and the policy wants {rules.min_rows} in every "
            "round (min_rows); add examples, or lower that"
        )
    return f"{data}: {reading.census.examples} examples"
