"""`offsite emulator`: build the stand-in of a model, and look into one."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Build and inspect emulators, the stand-ins that sites get."
)


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="A path, a hub id, or a name from the model zoo.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle; new or empty.")],
    builder: Annotated[str, typer.Option(help="crash, uniform or whole.")] = "crash",
    set: Annotated[
        list[str] | None, typer.Option(help="A setting of the builder, NAME=VALUE, such as keep=20.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Public text the builder may look at.")] = None,
    identity: Annotated[
        Path | None, typer.Option(help="The coordinator's kit; its owner key signs the bundle.")
    ] = None,
) -> None:
    """Build a bundle: the emulator, its tokenizer and a manifest."""
    from offsite.coordinator.bundles import build as build_bundle
    from offsite.coordinator.bundles import describe
    from offsite.protos.documents import assign
    from offsite.protos.errors import ConflictError
    from offsite.protos.spec import Choice

    if out.exists() and any(out.iterdir()):
        raise ConflictError(f"{out}: not empty; a bundle is everything in its folder, so name a new one")
    built = build_bundle(
        model,
        Choice(name=builder, settings=assign(set or [], {})),
        out,
        calibration=calibration,
        owner_key=identity / "owner.key" if identity else None,
    )
    _show(describe(built.manifest), str(out), signature="signed" if identity else "none")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    owner: Annotated[Path | None, typer.Option(help="owner.pub to check the signature with.")] = None,
    format: Annotated[Literal["table", "json"], typer.Option(help="How to print it.")] = "table",
) -> None:
    """Check a bundle's digests (and signature) and say what it holds."""
    from offsite.coordinator.bundles import describe, open_bundle

    figures = describe(open_bundle(folder, owner_public=owner).manifest)
    if format == "json":
        print(json.dumps(figures, indent=2))
    else:
        _show(figures, str(folder), signature="valid" if owner else "not checked; name owner.pub with --owner")


def _show(figures: dict[str, Any], title: str, *, signature: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    base = figures["base"]
    table.add_row("base", f"{base['name']}: {base['layers']} layers, {base['parameters']:,} parameters")
    table.add_row("base digest", base["digest"])
    table.add_row("builder", f"{figures['builder']['name']} {figures['builder']['settings'] or ''}")
    table.add_row("layers", " ".join(map(str, figures["layers"])))
    table.add_row("trainable", " ".join(map(str, figures["trainable"])))
    table.add_row(
        "parameters", f"{figures['parameters']:,} = {figures['disclosed']:.1%} of the base, disclosed verbatim"
    )
    table.add_row("size", f"{figures['bytes'] / 1e6:,.1f} MB in {len(figures['files'])} files")
    table.add_row("signature", signature)
    Console().print(table)
