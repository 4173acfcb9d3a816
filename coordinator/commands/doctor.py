"""`offsite coordinator doctor`: look whether the owner's machine has what a coordinator needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.coordinator.commands.options import Format

if TYPE_CHECKING:
    from offsite.protos.checks import Check


def doctor(
    identity: Annotated[Path, typer.Option(help="The coordinator's kit.")],
    home: Annotated[Path, typer.Option(help="The coordinator's folder.")] = Path("offsite-home"),
    policy: Annotated[Path | None, typer.Option(help="What researchers may do (TOML).")] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "127.0.0.1:8443",
    disk: Annotated[float, typer.Option(min=0, help="GB that are to be free at the folder.")] = 20.0,
    memory: Annotated[float, typer.Option(min=0, help="GB of memory that are wanted.")] = 4.0,
    format: Format = "text",
) -> None:
    """Check this machine before `offsite coordinator up`, one line for each thing: ok, warn, or fail with what to do.

    The exit code is 0 unless something fails, and then the highest of what failed.
    """
    from offsite.protos import checks

    raise typer.Exit(checks.show(_checks(identity, home, policy, listen, disk, memory), form=format))


def _checks(
    identity: Path, home: Path, policy: Path | None, listen: str, disk: float, memory: float
) -> Iterator["Check"]:
    from offsite.protos import checks

    yield checks.check("versions", lambda: checks.versions("torch", "transformers", "ray", "sqlalchemy", "grpcio"))
    yield checks.check("kit", lambda: checks.kit(identity, "coordinator"))
    yield checks.check("port", lambda: _port(listen))
    if policy is not None:
        yield checks.check("policy", lambda: _policy(policy))
    yield checks.check("disk", lambda: checks.disk(home, least_gb=disk))
    yield checks.check("memory", lambda: checks.memory(least_gb=memory))
    yield checks.check("gpu", checks.gpus)


def _port(listen: str) -> str:
    """Listen for a moment."""
    import socket

    from offsite.protos.addresses import parse
    from offsite.protos.errors import ResourceError

    address = parse(listen, listening=True)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python adds where it was to be
        raise ResourceError(f"{address}: {reason}; end what listens there, or name another with --listen") from None
    return f"{address} is free"


def _policy(file: Path) -> str:
    from offsite.coordinator.policy import OwnerPolicy

    return f"{file}: {len(OwnerPolicy.load(file).models)} models that researchers may name"
