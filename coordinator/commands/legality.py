"""`offsite legality`: which methods, builders, strategies and stages go together."""

import json
from dataclasses import asdict

import typer

from offsite.coordinator.commands.options import Pages

app = typer.Typer(add_completion=False)


@app.command()
def legality(
    format: Pages = "text",
) -> None:
    """Show which parts of a run go together, by what each declares; a pair that is empty is refused."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table

    from offsite.coordinator.survey import pages
    from offsite.coordinator.survey.matrix import matrix

    pairs = matrix()
    if format == "json":
        print(json.dumps(asdict(pairs), indent=2))
    elif format == "markdown":
        print(pages.legality(pairs), end="")
    else:
        tables = [
            ("method", pairs.strategies),
            ("method", pairs.builders),
            ("stage", pairs.stages),
            ("part", pairs.parts),
            ("memory", pairs.memories),
            ("optimiser", pairs.optimisers),
        ]
        for corner, rows in tables:
            table = Table(
                Column(corner, no_wrap=True),
                *next(iter(rows.values())),
                box=SIMPLE_HEAD,
                pad_edge=False,
                padding=(0, 1, 0, 0),
            )
            for name, cells in rows.items():
                table.add_row(name, *cells.values())
            Console().print(table)
        Console().print("spared: a builder may change any layer but those that train.")
        Console().print(f"Merged models: {', '.join(name for name, yes in pairs.merging.items() if yes)}.")
