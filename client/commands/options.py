"""Options that commands share: with whom they speak and as whom, by an option, the environment or a profile."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _of_profile(name: Literal["coordinator", "identity"]) -> str | None:
    from offsite.client.profiles import setting

    return setting(name)


def _needed(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    if value is None and not context.resilient_parsing:
        name = str(parameter.name)
        context.fail(
            f"Missing option '--{name}': give it, set OFFSITE_{name.upper()}, or keep it in a profile, by `offsite "
            "identity profile add`."
        )
    return value


def named(name: Literal["coordinator", "identity"], help: str) -> Any:
    """Return the option of a command that speaks with a coordinator."""
    return typer.Option(
        f"--{name}",
        envvar=f"OFFSITE_{name.upper()}",
        help=f"{help} (default: the profile's)",
        default_factory=partial(_of_profile, name),
        show_default=False,
        callback=_needed,
    )


def optional(name: Literal["coordinator", "identity"]) -> Any:
    """Return the same option of a command that may do without."""
    return typer.Option(
        f"--{name}",
        envvar=f"OFFSITE_{name.upper()}",
        help=f"{_HELP[name]} (default: the profile's)",
        default_factory=partial(_of_profile, name),
        show_default=False,
    )


_HELP = {
    "coordinator": "HOST:PORT of the coordinator, or of several gateways.",
    "identity": "The kit of an owner, a researcher or an auditor.",
}
Coordinator = Annotated[str, named("coordinator", _HELP["coordinator"])]
Kit = Annotated[Path, named("identity", _HELP["identity"])]
Format = Annotated[Literal["text", "json"], typer.Option(help="For people or for programs.")]
