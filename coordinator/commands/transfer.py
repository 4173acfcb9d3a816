"""`offsite transfer`: move what was tuned to a new base, without the data."""

from pathlib import Path
from typing import Annotated

import typer

from offsite.coordinator.commands.options import Format

app = typer.Typer(add_completion=False)


@app.command()
def transfer(
    old: Annotated[str, typer.Argument(help="The base that was tuned: a path, a hub id, or a name from the zoo.")],
    adapter: Annotated[Path, typer.Argument(help="What a run has published for it: its folder adapter/.")],
    new: Annotated[str, typer.Argument(help="The base that takes its place, of any family.")],
    *,
    seeds: Annotated[
        Path, typer.Option(help="A few public examples of the task; the new base writes others like them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new adapter and the report; new or empty.")],
    measured: Annotated[
        Path | None,
        typer.Option(help="Folder adapter/ of a run that counted words on the old base: what real rows are like."),
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="Examples to measure both bases on, before and after.")] = None,
    method: Annotated[str, typer.Option(help="What trains beside the new base.")] = "lora",
    trainable: Annotated[str, typer.Option(help="In which of its layers.")] = "kept",
    texts: Annotated[int, typer.Option(help="Texts that the new base writes.", min=1)] = 128,
    shots: Annotated[int, typer.Option(help="Examples that it is shown before each.", min=1)] = 5,
    share: Annotated[
        float, typer.Option(help="Of the texts that is learned: the most real ones, or what the adapter changes most.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(help="At which it writes; 0: the likeliest words.", min=0)] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 60,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 4,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest. (default: what suits the method and the new base)")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence; longer ones are cut.", min=2)] = 256,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    format: Format = "text",
) -> None:
    """Move an adapter to a new base by texts that this writes and the old one answers; no site is asked.

    The folder has the new adapter, the texts that were learned, and what it did. Old answers may repeat private text.
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from offsite.emulator import methods, placements, zoo
    from offsite.emulator.modality import read
    from offsite.emulator.transfer import discrimination
    from offsite.emulator.transfer.move import Move, move
    from offsite.protos.errors import ConflictError, InputError, NotFoundError
    from offsite.protos.recipes import parse_one

    if out.exists() and any(out.iterdir()):
        raise ConflictError(f"{out}: not empty; name a new folder")
    if not adapter.is_dir():
        raise NotFoundError(f"{adapter}: there is no such folder; name that of a published adapter")
    chosen, layers = parse_one(method), parse_one(trainable)
    try:
        how = Move(texts, shots, share, temperature, steps, batch_size, learning_rate, max_length, seed)
        trains = methods.make(chosen.name, chosen.settings)
        placement = placements.make(layers.name, layers.settings)
        examples, exam = read(seeds), read(held_out) if held_out else ()
        sums = discrimination.read(measured) if measured else None
        bases = [zoo.locate(name, cache=zoo.cache_folder()) for name in (old, new)]
        with Console(stderr=True).status("reading") as status:
            moved = move(
                bases[0],
                adapter,
                bases[1],
                examples,
                how,
                method=trains,
                placement=placement,
                measured=sums,
                held_out=exam,
                tell=lambda what, step, steps: status.update(f"{what}: {step} of {steps}" if step else what),
            )
        out.mkdir(parents=True, exist_ok=True)
        trains.export(out / "adapter", moved.adapter, base=zoo.load_base(bases[1], dtype="auto")[0], base_name=new)
    except ValueError as error:
        raise InputError(str(error)) from error
    (out / "texts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in moved.rows))
    figures = moved.figures
    report = {
        "texts": moved.written,
        "learned": len(moved.rows),
        "perplexity": figures._asdict() if figures else None,
        "recovered": figures.recovered if figures and figures.recovered == figures.recovered else None,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    if format == "json":
        print(json.dumps(report, indent=2))
        return
    console = Console()
    if figures:
        table = Table("perplexity", "as it was", "with the adapter")
        table.add_row("old base", f"{figures.old_base:.2f}", f"{figures.old_tuned:.2f}")
        table.add_row("new base", f"{figures.new_base:.2f}", f"{figures.new_tuned:.2f}")
        console.print(table)
    console.print(f"{len(moved.rows)} of {moved.written} texts were learned; the new adapter is in {out / 'adapter'}.")
