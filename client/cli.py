"""`offsite`: one command line; its groups come from the entry points `offsite.commands` and load when used."""

import os
import signal
import sys
from importlib.metadata import entry_points, version
from re import DOTALL, fullmatch
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from offsite.protos.errors import OffsiteError, from_system

EXTRAS = {
    "cluster": "coordinator",
    "coordinator": "coordinator",
    "emulator": "coordinator",
    "legality": "coordinator",
    "methods": "coordinator",
    "pki": "coordinator",
    "run": "model",
    "site": "client",
    "demo": "all",
    "simulate": "all",
}


class Commands(TyperGroup):
    """Groups of the installed ends; one that is missing is not an error until it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the groups' names."""
        return sorted(entry.name for entry in entry_points(group="offsite.commands"))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load one group."""
        for entry in entry_points(group="offsite.commands", name=cmd_name):
            command = typer.main.get_command(entry.load())
            command.name = cmd_name
            return command
        return None


def at_home(argument: str) -> str:
    """Expand a `~` that the shell left as it stands: in quotes, or after `--data=`."""
    option, path = fullmatch(r"((?:--[a-z-]+=)?)(.*)", argument, DOTALL).groups()  # type: ignore[union-attr]
    return option + (os.path.expanduser(path) if path.startswith("~") else path)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Tune a language model that may not leave its owner on data that may not leave its sites.",
    epilog="Exit codes: 0 done, 1 internal, 2 usage, 3 bad input, 4 identity, 5 refused, 6 not found, 7 mismatch, "
    "8 missing resource, 9 unreachable, 10 run failed, 11 conflict, 130 interrupted.",
)


def _say_version(flag: bool) -> None:
    if flag:
        typer.echo(f"offsite {version('offsite')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and end.")
    ] = False,
) -> None:
    """Hold the groups together."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; not a KeyboardInterrupt, which the command-line library would turn into exit code 1."""


def main() -> None:
    """Run the command line; every error is one sentence on stderr and a documented exit code."""
    # Set even where they are ignored: a shell starts its background jobs that way.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        app(args=[at_home(argument) for argument in sys.argv[1:]], prog_name="offsite")
    except OffsiteError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        known = from_system(error)
        _fail(str(known), known.exit_code)
    except Interrupted:
        print("offsite: interrupted", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # all is unwound; what libraries have in other threads may hold up an orderly end
    except ModuleNotFoundError as error:
        group = sys.argv[1] if len(sys.argv) > 1 else ""
        extra = EXTRAS.get(group, "all")
        _fail(f"{error.name} is not installed; `offsite {group}` needs: pip install 'offsite[{extra}]'", 8)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind, so that child processes are ended."""
    raise Interrupted


def _fail(message: str, code: int) -> None:
    print(f"offsite: {message}", file=sys.stderr)
    sys.exit(code)
