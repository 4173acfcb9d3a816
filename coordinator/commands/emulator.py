"""`offsite emulator`: build the stand-in of a model, and look into one."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.coordinator.commands.compare import compare
from offsite.coordinator.commands.options import Format

if TYPE_CHECKING:
    from offsite.coordinator.bundles.manifests import Description
    from offsite.protos.spec import Grounds

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Build, compare and inspect emulators, the stand-ins that sites get.",
)


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="A path, a hub id, or a name from the model zoo.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle; new or empty.")],
    builder: Annotated[
        str, typer.Option(help="How, such as 'crash(keep=24)+quantised'; `offsite emulator builders` lists them.")
    ] = "crash",
    trainable: Annotated[
        str, typer.Option(help="Which layers train: 'ends(bottom=2,top=2)', 'spread(count=4)' or kept.")
    ] = "ends",
    public: Annotated[Path | None, typer.Option(help="Public text the builders may look at and tune on.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text the builders look at instead, such as the task's; never tuned on.")
    ] = None,
    identity: Annotated[
        Path | None, typer.Option(help="The coordinator's kit; its owner key signs the bundle.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(help="Read the base layer by layer; by default if it would fill half of this machine's memory."),
    ] = None,
    format: Format = "text",
) -> None:
    """Build a bundle: the emulator, its tokenizer and a manifest."""
    from offsite.protos.errors import ConflictError, MismatchError
    from offsite.protos.recipes import parse, parse_one

    chain, placement = parse(builder), parse_one(trainable)
    if out.exists() and any(out.iterdir()):
        raise ConflictError(f"{out}: not empty; a bundle is everything in its folder, so name a new one")

    from rich.console import Console

    from offsite.coordinator.bundles.building import build as build_bundle
    from offsite.coordinator.bundles.manifests import describe
    from offsite.coordinator.bundles.trial import try_out
    from offsite.emulator import methods
    from offsite.protos import tensors
    from offsite.protos.documents import to_plain
    from offsite.protos.output import say
    from offsite.protos.spec import METHOD

    unfinished = out.with_name(f"{out.name}.unfinished")
    with Console(stderr=True).status("building") as status:
        built = build_bundle(
            model,
            chain,
            placement,
            out,
            public=public,
            calibration=calibration,
            owner_key=identity / "owner.key" if identity else None,
            scratch=unfinished,
            stream=stream,
            tell=lambda what, step, steps: status.update(f"{what}: {step} of {steps}"),
        )
        status.update("loading what was built, and taking a training step")
        try:
            try_out(built, methods.make(METHOD.name, METHOD.settings))
        except MismatchError:
            shutil.rmtree(out)
            raise
    shutil.rmtree(unfinished, ignore_errors=True)
    recovery = out.with_name(f"{out.name}.recovery.safetensors")
    if built.recovery:
        tensors.save(recovery, built.recovery)
    figures = describe(built.manifest)
    if format == "json":
        more = {"folder": str(out), "computed": built.computed, "recovery": str(recovery) if built.recovery else None}
        say(format, to_plain(figures) | more)
        return
    _show(figures, str(out), signature="signed" if identity else "none")
    Console().print(f"Computed in {built.computed}; layers are always chosen in fp32.")
    if built.recovery:
        Console().print(f"{recovery} brings what is trained back to the base. It is the owner's, not the sites'.")


@app.command("builders")
def list_builders(format: Format = "text") -> None:
    """List the builders, what they do and their settings."""
    import sys
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from offsite.emulator import builders
    from offsite.emulator.builders.base import STAGES
    from offsite.protos.output import say

    rows: list[dict[str, Any]] = []
    for name, kind in sorted(
        builders.BUILDERS.sound().items(), key=lambda item: (STAGES.index(item[1].stage), item[0])
    ):
        plug_in: Any = kind
        about = " ".join((plug_in.__doc__ or "").split("\n\n")[0].split())
        rows.append({"stage": kind.stage, "name": name, "settings": asdict(plug_in()), "about": about})
    for fault in builders.BUILDERS.unsound():
        print(fault, file=sys.stderr)
    if format == "json":
        say(format, rows)
        return
    table = Table("stage", "builder", "settings and their defaults", "what it does", show_lines=True)
    for row in rows:
        settings = ", ".join(f"{setting}={value}" for setting, value in row["settings"].items())
        table.add_row(row["stage"], row["name"], settings, row["about"])
    Console().print(table)
    Console().print("Builders of several stages are joined by '+', in this order: crash(keep=24)+distilled+quantised.")


app.command()(compare)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    owner: Annotated[Path | None, typer.Option(help="owner.pub to check the signature with.")] = None,
    format: Format = "text",
) -> None:
    """Check a bundle's digests (and signature) and say what it holds."""
    from offsite.coordinator.bundles.manifests import describe, read
    from offsite.protos.documents import to_plain
    from offsite.protos.output import say

    figures = describe(read(folder, owner_public=owner))
    if format == "json":
        say(format, to_plain(figures))
    else:
        _show(figures, str(folder), signature="valid" if owner else "not checked; name owner.pub with --owner")


def _show(figures: "Description", title: str, *, signature: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from offsite.protos.recipes import render

    table = Table(title=title, show_header=False, title_justify="left")
    base = figures.base
    table.add_row("base", f"{base.name}: {base.layers} layers, {base.parameters:,} parameters")
    table.add_row("base digest", base.digest)
    table.add_row("builders", render(figures.builders))
    table.add_row("layers", " ".join(map(str, figures.layers)))
    if grounds := figures.grounds:
        table.add_row("chosen", _grounds(grounds))
    table.add_row("trainable", " ".join(map(str, figures.trainable)))
    table.add_row("parameters", f"{figures.parameters:,}")
    lossy = f", {figures.disclosed_lossy:.1%} in few bits" if figures.lossy else ""
    table.add_row("disclosed", f"{figures.disclosed:.1%} of the base's parameters verbatim{lossy}")
    if figures.experts:
        table.add_row("experts", f"{figures.experts:,} parameters, kept as they are; LoRA does not train them")
    table.add_row("protection", "not protected: no attack was measured; see `offsite emulator compare`")
    table.add_row("size", f"{figures.bytes / 1e6:,.1f} MB in {len(figures.files)} files")
    table.add_row("signature", signature)
    Console().print(table)


def _grounds(grounds: "Grounds") -> str:
    """Say in a line how near another choice of layers was."""
    if grounds.gap is None:
        return "no layer could go or stay instead of another"
    text = f"layers that were told apart differ by {grounds.gap:.1%} in 1 - CKA"
    if grounds.ways == 1:
        return f"{text}; no other choice is within {grounds.margin:.0%}"
    return f"{text}: of {grounds.ways} ways the calibration text chose, by {grounds.lead:.2f} nats a token"
