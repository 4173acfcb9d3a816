"""`offsite`: one command line; its groups come from the entry points `offsite.commands` and load when used."""

import os
import signal
import sys
from importlib.metadata import entry_points, version
from re import DOTALL, fullmatch
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from offsite.protos.errors import OffsiteError, from_system

GROUP = "offsite.commands"
# What each of our groups needs, and its line of help: so that `offsite --help` loads none of them.
GROUPS = {
    "cluster": ("coordinator", "Have several machines of the owner's do the steps of runs."),
    "coordinator": ("coordinator", "Run the coordinator, the model owner's end."),
    "data": ("model", "Look at data where they are, before any task."),
    "demo": (
        "all",
        "Fetch a model and private data of four sites, tune it without any site holding it, and report.",
    ),
    "doctor": ("model", "Check this machine, one line for each thing: ok, warn, or fail with what to do."),
    "emulator": ("coordinator", "Build, compare and inspect emulators, the stand-ins that sites get."),
    "eval": ("model", "Say what runs have come to, over more than one."),
    "identity": ("all", "Join by a token, and look after your kit."),
    "legality": (
        "coordinator",
        "Show which parts of a run go together, by what each declares; a pair that is empty is refused.",
    ),
    "methods": (
        "coordinator",
        "List the methods: what trains, what crosses the wire, how it is averaged, and on which emulators it works.",
    ),
    "pki": ("coordinator", "Say who takes part: certificates for the coordinator, the sites and the people."),
    "run": ("model", "Submit federated runs and look after them."),
    "serve": (
        "web,model",
        "Answer with a base and its published LoRA over OpenAI's API on loopback, for a first look.",
    ),
    "simulate": ("all", "Do a run with virtual sites, through the code of a live one, and report."),
    "site": ("client", "Take part as a data site."),
    "transfer": (
        "all",
        "Move an adapter to a new base by texts that this writes and the old one answers; no site is asked.",
    ),
    "version": ("all", "Look at the versions of runs, and take them back."),
    "web": (
        "web",
        "Show runs, sites, figures and versions in a browser, and submit and cancel runs, as who the kit says.",
    ),
}


class Commands(TyperGroup):
    """Groups of the installed ends; one that is missing is not an error until it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the groups' names."""
        return sorted(entry.name for entry in entry_points(group=GROUP))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return what a list of groups shows of one: of ours it is known, another package's is loaded for it."""
        if cmd_name in GROUPS and entry_points(group=GROUP, name=cmd_name):
            return TyperCommand(cmd_name, help=GROUPS[cmd_name][1])
        return _load(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Load the group that is called."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from offsite.protos.documents import nearest

            ctx.fail(f"No such command {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(args[0]), rest


def _load(name: str) -> Any:
    for entry in entry_points(group=GROUP, name=name):
        command = typer.main.get_command(entry.load())
        command.name = name
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
    profile: Annotated[
        str,
        typer.Option(
            envvar="OFFSITE_PROFILE",
            show_envvar=True,
            show_default=False,
            help="Whose coordinator and kit to take: `offsite identity profile`. (default: the one in use)",
        ),
    ] = "",
) -> None:
    """Hold the groups together."""
    if profile:
        os.environ["OFFSITE_PROFILE"] = profile


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
        extra, _ = GROUPS.get(group, ("all", ""))
        _fail(f"{error.name} is not installed; `offsite {group}` needs: pip install 'offsite[{extra}]'", 8)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind, so that child processes are ended."""
    raise Interrupted


def _fail(message: str, code: int) -> None:
    print(f"offsite: {message}", file=sys.stderr)
    sys.exit(code)
