"""`offsite methods`: what each method trains, sends and asks for."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from offsite.coordinator.commands.options import Pages

app = typer.Typer(add_completion=False)


@app.command()
def methods(
    format: Pages = "text",
    errors: Annotated[
        bool, typer.Option("--errors", help="Measure the errors of what is not exact, too; Markdown always has them.")
    ] = False,
) -> None:
    """List the methods: what trains, what crosses the wire, how it is averaged, and on which emulators it works.

    Values and kB (of an update) are of one layer in the shapes of SmolLM2-135M, at the methods' defaults.
    """
    from rich.console import Console
    from rich.table import Table

    from offsite.coordinator.survey import pages
    from offsite.coordinator.survey.rows import approximations, emulators, survey
    from offsite.emulator.catalogue import METHODS

    rows, faults = survey(measured=errors or format == "markdown")
    if format == "json":
        print(json.dumps({"methods": [asdict(row) for row in rows], "refused": METHODS.refused}, indent=2))
    elif format == "markdown":
        print(pages.methods(rows, METHODS.refused), end="")
    else:
        near = ["near by, and the error"] if errors else []
        table = Table("method", "values", "kB", "exact by", *near, "merges", "seed", "emulators")
        for row in rows:
            table.add_row(
                row.name,
                f"{row.values:,}",
                f"{row.update_bytes / 1000:,.0f}",
                ("all" if not row.near else ", ".join(row.exact)) or "none",
                *([approximations(row)] if errors else []),
                "yes" if row.mergeable else "no",
                "common" if row.seeded else "any",
                emulators(row),
            )
        console = Console()
        console.print(table)
        console.print("Formulas, papers, rates, and how each tensor is averaged: --format markdown, or json.")
        if names := [*METHODS.refused]:
            console.print(f"They also say why {len(names)} other types of adapters, such as {names[0]}, are refused.")
    for fault in faults:
        print(fault, file=sys.stderr)
