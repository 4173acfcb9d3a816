"""`offsite site`: let a data site take part."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from offsite.client.commands.approvals import approve, pending, reject
from offsite.client.commands.identity import enrol
from offsite.client.site.record import record
from offsite.protos.telemetry.logs import Form, begin

if TYPE_CHECKING:
    from offsite.client.site.folder import WorkFolder
    from offsite.client.site.meter import Meter
    from offsite.emulator.examples import Census

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Take part as a data site.")
for command in (enrol, pending, approve, reject):
    app.command()(command)


@app.command()
def join(
    coordinator: Annotated[
        str,
        typer.Argument(
            help="HOST:PORT of the coordinator, or of several gateways with commas between. The site only dials out."
        ),
    ],
    identity: Annotated[Path, typer.Option(help="The site's kit, from the model owner.")],
    policy: Annotated[Path, typer.Option(help="The site's policy file (TOML): what may run here.")],
    data: Annotated[
        Path, typer.Option(help="Private examples: JSON Lines, JSON, CSV, Parquet, text, or a folder of these.")
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the model's tokenizer, if at hand: say what becomes of the rows.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for downloads, half-done work and the site's log. [default: offsite-site-NAME]"),
    ] = None,
    engine: Annotated[Literal["deepspeed", "plain"], typer.Option(help="What trains.")] = "deepspeed",
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed ZeRO stage.")] = 2,
    offload: Annotated[
        bool, typer.Option(help="Keep optimiser state and parameters in CPU memory (ZeRO 1 to 3).")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Training processes, one a GPU.")] = 1,
    launcher: Annotated[
        str,
        typer.Option(help="A command that starts them, also on other machines, such as 'srun --ntasks 8'; else we do."),
    ] = "",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a training process; 0 leaves it to torch.")] = 0,
    micro_batch: Annotated[
        int,
        typer.Option(
            min=0, help="Sequences in work at once; 0: all of a batch, and half as many whenever memory runs out."
        ),
    ] = 0,
    packing: Annotated[
        bool, typer.Option(help="Compute nothing of padding, where the model keeps packed sequences apart.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations twice, to keep few of them in memory: the same result, slower.")
    ] = False,
    metrics: Annotated[
        str,
        typer.Option(
            envvar="OFFSITE_METRICS",
            show_envvar=True,
            help="HOST:PORT for /metrics (Prometheus), /healthz and /readyz, by plain HTTP; else none.",
        ),
    ] = "",
    log_format: Annotated[
        Form,
        typer.Option(
            envvar="OFFSITE_LOG_FORMAT", show_envvar=True, help="json: what happens, for programs, on standard error."
        ),
    ] = "text",
    format: Annotated[Literal["text", "json"], typer.Option(help="How to log.")] = "text",
) -> None:
    """Pull tasks, train on this site's data within its policy, and upload the updates, until interrupted."""
    from offsite.client.channel import Channel
    from offsite.client.membership import Renewal
    from offsite.client.site.agent import Agent, SiteConfig, policy_digest
    from offsite.client.site.folder import WorkFolder
    from offsite.client.site.forecast import forecast
    from offsite.client.site.job import EngineSpec
    from offsite.client.site.meter import meter_at
    from offsite.client.site.policy import Policy
    from offsite.emulator import objectives
    from offsite.protos import addresses
    from offsite.protos.chunks import STALL_S
    from offsite.protos.documents import parse, to_plain
    from offsite.protos.errors import InputError
    from offsite.protos.security.identity import Identity

    addresses.parse_all(coordinator)  # before the data is read
    meter = meter_at(metrics)
    kit = Identity.load(identity, expect="site")
    begin(log_format, site=kit.name)
    rules = Policy.load(policy)
    rules.check_data(data)
    try:
        rows = rules.source(data)
        objective, reading = objectives.survey(rows)
        census, most = reading.census, rules.max_length
        coming = forecast(rows, tokenizer, max_length=most, objective=objective.name) if tokenizer else None
    except ValueError as error:
        raise InputError(str(error)) from None
    if format == "json":
        _log_json("policy", to_plain(rules) | {"file": str(policy), "training_on": str(data), **asdict(census)})
        if coming:
            _log_json("data", {"tokenizer": str(tokenizer), **coming})
    else:
        _show_policy(kit.name, rules.describe(), policy, data, census, coming)
    say = _saying(format, log_format, meter)
    _warn_of_few(say, census, rules.min_rows, data, policy)
    options: dict[str, Any] = {"zero_stage": zero_stage, "offload": offload, "processes": processes, "device": device}
    options |= {"name": engine, "threads": threads, "micro_batch": micro_batch}
    options |= {"launcher": launcher, "packing": packing, "checkpointing": checkpointing}
    spec = parse(EngineSpec, options, where="engine")
    channel = Channel(coordinator, kit, patience_s=STALL_S)
    folder = WorkFolder.open((work or Path(f"offsite-site-{kit.name}")).resolve(), kit)
    config = SiteConfig(kit, rules, policy_digest(policy), data, census.examples, folder, spec, meter)

    try:
        with Renewal(channel, kit, say=_telling(say, folder)):
            Agent(channel, config, say=say).run()
    finally:
        folder.close()
        channel.close()


@app.command()
def leave(
    coordinator: Annotated[str, typer.Argument(help="HOST:PORT of the coordinator, or of several gateways.")],
    identity: Annotated[Path, typer.Option(help="The site's kit, from the model owner.")],
    run: Annotated[str, typer.Option(help="The run to leave. (default: all that the site takes part in)")] = "",
    reason: Annotated[str, typer.Option(help="Why; people who follow the run read it.")] = "",
    format: Annotated[Literal["text", "json"], typer.Option(help="How to print.")] = "text",
) -> None:
    """Take part in a run, or in all of them, no longer: nothing more is asked of this site there, nobody waits for it.

    Who leaves all is no longer counted as here, unless `offsite site join` still runs: stop that first.
    """
    from offsite.client.channel import Channel
    from offsite.protos import fleet_pb2 as pb
    from offsite.protos import fleet_pb2_grpc
    from offsite.protos.chunks import STALL_S
    from offsite.protos.documents import plain
    from offsite.protos.security.identity import Identity

    channel = Channel(coordinator, Identity.load(identity, expect="site"), patience_s=STALL_S)
    try:
        fleet = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
        left = [*channel.call(fleet.Leave, pb.LeaveRequest(run=run, reason=reason)).runs]
    finally:
        channel.close()
    if format == "json":
        print(json.dumps({"left": left}))
    else:
        print(plain(f"left run {', '.join(left)}" if left else "took part in no run that is not over"))


def _warn_of_few(
    say: Callable[[str, dict[str, Any]], None], census: "Census", least: int, data: Path, policy: Path
) -> None:
    if census.distinct < least:
        what = f"{data} holds {census.distinct} distinct examples, and {policy} wants at least {least} distinct "
        what += (
            "sequences in every round (min_rows): unless long ones are divided into as many, every task is refused; "
        )
        say("warning", {"message": what + "add examples, or lower min_rows"})


def _telling(say: Callable[[str, dict[str, Any]], None], folder: "WorkFolder") -> Callable[[str], None]:
    def tell(message: str) -> None:
        say("identity", {"message": message})
        folder.write("identity", {"message": message})

    return tell


def _saying(format: Form, log_format: Form, meter: "Meter") -> Callable[[str, dict[str, Any]], None]:
    show = _log_json if format == "json" else _log_text

    def say(kind: str, data: dict[str, Any]) -> None:
        show(kind, data)
        if log_format == "json":
            record(kind, data)

    if meter.address:
        say("metrics", {"address": str(meter.address)})
    return say


def _show_policy(
    site: str,
    rows: list[tuple[str, str, str]],
    policy: Path,
    data: Path,
    census: "Census",
    coming: dict[str, Any] | None,
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"site {site}: policy of {policy}", show_header=False, title_justify="left")
    for field, value, why in rows:
        table.add_row(field, value, why)
    table.add_section()
    table.add_row("training on", Text(str(data)))
    for what, count in census.describe():
        table.add_row(what, Text(count))  # may quote a path or a value, which is no markup
    if coming:
        warnings = coming.pop("warnings")
        counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in coming.items())
        table.add_row("with the tokenizer", Text("\n".join([counts, *warnings])))
    Console().print(table)


def _log_json(kind: str, data: dict[str, Any]) -> None:
    print(json.dumps({"event": kind, "at": time.time(), **data}), flush=True)


def _log_text(kind: str, data: dict[str, Any]) -> None:
    pairs = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in data.items()
    )
    print(f"{time.strftime('%H:%M:%S')} {kind:9} {pairs}", flush=True)
