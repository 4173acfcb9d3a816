"""`offsite emulator compare`: build several emulators, and say which to hand out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from offsite.coordinator.commands.options import Format


def compare(
    model: Annotated[str, typer.Argument(help="A path, a hub id, or a name from the model zoo.")],
    *,
    grid: Annotated[
        list[str],
        typer.Option(
            help="Emulators to compare: a recipe such as 'crash(keep=20|24)+quantised(format=nf4)', where | makes one "
            "of each, or a TOML file with a list `recipes`. Repeatable."
        ),
    ],
    train: Annotated[Path, typer.Option(help="Examples of the task, such as a site would have.")],
    held_out: Annotated[Path, typer.Option(help="Other examples of the same task, to measure on.")],
    public: Annotated[Path, typer.Option(help="Public text: for builders that read text, and for the attack by it.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text that builders look at, such as the task's. (default: the text of --public)"),
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="Text to measure general ability on. (default: the second half of --public)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report; run again, it goes on from what is in it.")],
    trainable: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that train, such as 'ends(bottom=1,top=1)'. Repeatable. (default: ends)",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="What trains in them, such as 'lora(rank=4|8)'. Repeatable. (default: lora)"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of every tuning.", min=1)] = 40,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 4,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of every tuning. (default: what suits each method and the model)")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence; longer ones are cut.", min=2)] = 256,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of frozen weights.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of starting values and the order of examples.", min=0)] = 0,
    attack_steps: Annotated[
        int | None, typer.Option(help="Steps of the shorter attacks. (default: --steps)", min=1)
    ] = None,
    attack_longest: Annotated[
        int,
        typer.Option(
            help="Steps of the longer attacks, in multiples of that; with 4 attacking takes up to 14 times as many "
            "steps, with 1 up to 5 times.",
            min=1,
        ),
    ] = 4,
    attack_learning_rate: Annotated[
        float | None, typer.Option(help="Of the attacks, which train all of it. (default: what suits the model)")
    ] = None,
    protected_from: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Call an emulator protected if every attack stays this far behind. (default: none is called so)",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Also measure accuracy at this task of lm-eval. Repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of a task. (default: all)", min=1)] = None,
    format: Format = "text",
) -> None:
    """Build emulators side by side: what the tuned model gains, what they give away, what a site can do with them.

    Writes comparison.json and comparison.html. Each is tuned as at a site, plugged into the base, and attacked.
    """
    from rich.console import Console

    from offsite.coordinator.comparison import page
    from offsite.coordinator.comparison.compare import compare as measure
    from offsite.coordinator.comparison.plan import Plan, cross
    from offsite.coordinator.comparison.table import table
    from offsite.protos.documents import parse, to_json
    from offsite.protos.recipes import render
    from offsite.protos.spec import METHOD, TRAINABLE

    plan = parse(
        Plan,
        {
            "model": model,
            "candidates": cross(grid, trainable or [render([TRAINABLE])], method or [render([METHOD])]),
            "train": str(train),
            "held_out": str(held_out),
            "public": str(public),
            "calibration": str(calibration or ""),
            "general": str(general or ""),
            "training": {
                "steps": steps,
                "batch_size": batch_size,
                "max_length": max_length,
                "precision": precision,
                "seed": seed,
            },
            "learning_rate": learning_rate,
            "attack_steps": attack_steps or steps,
            "attack_longest": attack_longest,
            "attack_learning_rate": attack_learning_rate,
            "protected_from": protected_from,
            "tasks": tuple(task or ()),
            "limit": limit,
        },
        where="comparison",
    )
    out.mkdir(parents=True, exist_ok=True)
    with _telling() as tell:
        comparison = measure(plan, out, tell=tell)
    (out / "comparison.json").write_bytes(to_json(comparison))
    page.write(comparison, out / "comparison.html")
    if format == "json":
        print(to_json(comparison).decode())
    else:
        Console().print(table(comparison), f"The report is in {out / 'comparison.html'} and {out / 'comparison.json'}.")


@contextmanager
def _telling() -> Iterator[Callable[[str, int, int], None]]:
    """Say on stderr what is being done: one live line on a terminal, elsewhere a line for each new thing."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False)
    lines: list[str] = []
    with console.status("reading the texts") as status:

        def tell(what: str, step: int, steps: int) -> None:
            if console.is_terminal:
                status.update(f"{escape(what)}{f' {step}/{steps}' if steps > 1 else ''}")
            elif what not in lines[-1:]:
                console.print(escape(what), soft_wrap=True)
            lines[:] = [what]

        yield tell
