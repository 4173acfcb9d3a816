"""`offsite coordinator`: run the owner's end."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from offsite.coordinator.commands.backup import backup, restore
from offsite.coordinator.commands.doctor import doctor
from offsite.coordinator.commands.options import Format
from offsite.coordinator.commands.sizes import size
from offsite.coordinator.commands.status import status
from offsite.protos.telemetry.logs import Form, begin

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run the coordinator, the model owner's end.")


Home_ = Annotated[Path, typer.Option("--home", help="The coordinator's folder; made if missing.")]
LogFormat = Annotated[
    Form, typer.Option(envvar="OFFSITE_LOG_FORMAT", show_envvar=True, help="How the log on standard error is written.")
]
KeepRuns = Annotated[
    int | None, typer.Option(min=0, help="Keep the published files of so many newest ended runs; else of all.")
]
KeepDays = Annotated[
    float | None, typer.Option(min=0, help="Keep the published files of runs for so many days; else for ever.")
]
WorkingDays = Annotated[
    float, typer.Option(min=0, help="Keep what a run worked with (bundles, updates) for so many days after its end.")
]


@app.command()
def up(
    identity: Annotated[Path, typer.Option(help="The coordinator's kit, from `offsite pki issue --role coordinator`.")],
    home: Home_ = Path("offsite-home"),
    policy: Annotated[
        Path | None, typer.Option(help="What researchers may do (TOML), see docs/owner.toml. None: nothing.")
    ] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")] = "127.0.0.1:8443",
    executor: Annotated[
        Literal["ray", "threads", "none"],
        typer.Option(help="Where supervisors and their steps run; none: serve only, another gateway dispatches."),
    ] = "ray",
    ray_address: Annotated[
        str,
        typer.Option(help="The head of a Ray cluster that this machine is in; with blobs in S3 any node does steps."),
    ] = "",
    ray_token: Annotated[
        Path | None,
        typer.Option(help="The file with its token. (default: RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)"),
    ] = None,
    places: Annotated[int, typer.Option("--runs", min=1, help="Runs worked on at once; others stay queued.")] = 8,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a step; 0 takes all.")] = 0,
    part: Annotated[
        str,
        typer.Option(help="A step is divided among nodes only into parts of so much, of updates or of the base."),
    ] = "64MiB",
    keep_runs: KeepRuns = None,
    keep_days: KeepDays = None,
    working_days: WorkingDays = 7.0,
    journal: Annotated[
        str,
        typer.Option(
            envvar="OFFSITE_JOURNAL", show_envvar=True, help="URL of the journal, kept in HOME; else SQLite there."
        ),
    ] = "",
    blobs: Annotated[
        str,
        typer.Option(
            envvar="OFFSITE_BLOBS", show_envvar=True, help="URL of the blobs, kept in HOME; else a folder there."
        ),
    ] = "",
    authority: Annotated[
        Path | None,
        typer.Option(
            help="The authority's folder (`offsite pki`): certify who joins or renews. None: that is signed elsewhere."
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            envvar="OFFSITE_METRICS",
            show_envvar=True,
            help="HOST:PORT for /metrics (Prometheus), /healthz and /readyz, by plain HTTP; else none.",
        ),
    ] = "",
    log_format: LogFormat = "text",
    format: Format = "text",
) -> None:
    """Serve sites and people until interrupted; unfinished runs go on where they were.

    Several that share a journal and blobs, each with a HOME of its own, are gateways to the same runs: each serves
    anybody, one of them dispatches the runs, and another takes over within seconds when it is gone.

    What need not be kept is collected at the start and every six hours, as `offsite coordinator gc` does.
    """
    begin(log_format)
    os.umask(0o077)  # journal, updates and emulators are nobody else's on this machine
    # gRPC has no setting for it, and reads this once, when it is imported: the suites of TLS 1.2 that are left need an
    # RSA certificate, ours are ECDSA, so what remains is TLS 1.3.
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"
    from offsite.coordinator.home import Home
    from offsite.coordinator.policy import OwnerPolicy
    from offsite.coordinator.retention import Retention
    from offsite.coordinator.runs.executor import Executor, InProcess
    from offsite.coordinator.service.meter import meter_at
    from offsite.coordinator.service.server import run
    from offsite.protos.addresses import Address, parse
    from offsite.protos.documents import to_plain

    address, least = parse(listen, listening=True), max(1, size(part, "--part"))
    meter = meter_at(metrics)
    rules = OwnerPolicy.load(policy) if policy else OwnerPolicy()
    if format == "json":
        event = {"event": "policy", **to_plain(rules), "file": str(policy or "")}
        print(json.dumps(event), flush=True)
    else:
        _show_policy(rules.describe(), policy)

    def make(home: Home) -> Executor:
        if executor == "threads":
            return InProcess(home)
        from offsite.coordinator.runs.cluster import OnRay

        return OnRay(
            home, address=ray_address or None, token=ray_token, threads=threads, part=least, log_form=log_format
        )

    def steps() -> str:
        alone = ray_address and not at.node.shared
        return f"steps on {executor}{', all on this machine, where the folder of blobs is' if alone else ''}"

    def ready(port: int, leads: bool) -> None:
        here = Address(address.host, port)
        if format == "json":
            asked = {"metrics": str(meter.address)} if meter.address else {}
            print(json.dumps({"event": "ready", "address": str(here), "dispatches": leads} | asked), flush=True)
        else:
            role = steps() if leads else "another gateway dispatches the runs"
            metering = f", metrics on {meter.address}" if meter.address else ""
            print(f"coordinator ready on {here}; home {home}, {role}{metering}. Ctrl-C stops it.", flush=True)

    def moved(leads: bool) -> None:
        if format == "json":
            print(json.dumps({"event": "dispatches" if leads else "stands by"}), flush=True)
        else:
            role = f"dispatches the runs from now on, {steps()}" if leads else "leaves the runs to another one"
            print(f"this gateway {role}", flush=True)

    retention = Retention(keep_runs=keep_runs, keep_days=keep_days, working_days=working_days)
    at = Home(home.resolve(), identity.resolve())
    rest: dict[str, Any] = {
        "meter": meter,
        "policy": rules,
        "places": places,
        "retention": retention,
        "journal": journal,
        "blobs": blobs,
        "authority": authority and authority.resolve(),
    }
    run(at, address, None if executor == "none" else make, ready=ready, moved=moved, **rest)


@app.command()
def gc(
    home: Home_ = Path("offsite-home"),
    keep_runs: KeepRuns = None,
    keep_days: KeepDays = None,
    working_days: WorkingDays = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    format: Format = "text",
) -> None:
    """Remove files that no run needs; a coordinator may be up. Rows, reports and events of runs stay.

    Where a manifest is lost, what it may have named stays, the rest goes, and the exit code is 7.
    """
    from offsite.coordinator.home import Home
    from offsite.coordinator.retention import Retention, collect
    from offsite.protos.errors import MismatchError, NotFoundError

    root = home.resolve()
    if not (at := Home(root, root)).begun:
        raise NotFoundError(f"{root}: not a coordinator's folder: it has no journal; name one with --home")
    retention = Retention(keep_runs=keep_runs, keep_days=keep_days, working_days=working_days)
    freed = collect(at.prepare(), retention, dry_run=dry_run)
    if format == "json":
        print(json.dumps({"dry_run": dry_run, **vars(freed)}))
    else:
        print(f"{'would remove' if dry_run else 'removed'} {freed}")
    if freed.lost:
        raise MismatchError(
            f"{len(freed.lost)} manifests cannot be read; what they may name was kept: {'; '.join(freed.lost)}"
        )


app.command()(backup)
app.command()(restore)
app.command()(doctor)
app.command()(status)


def _show_policy(rows: list[tuple[str, str, str]], policy: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if policy is None:
        console.print("no --policy: researchers can submit nothing, only owners can; docs/owner.toml is an example")
        return
    table = Table(title=f"owner's policy of {policy}, until the next start", show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
