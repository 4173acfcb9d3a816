"""`offsite demo`: the main job on this machine, from nothing to an adapter and a report."""

import json
from pathlib import Path
from re import fullmatch
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from offsite.client.demo.play import Settings

RESERVED = ("coordinator", "researcher", "bound", "attack", "owner")

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the report and the logs.")] = Path("offsite-demo"),
    model: Annotated[str, typer.Option(help="A path, a hub id, or a name from the zoo.")] = "smollm2-135m-instruct",
    site: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: a site and its examples (JSONL, Parquet, text or folder). Repeat for more."),
    ] = None,
    public: Annotated[Path | None, typer.Option(help="Public text for the emulator's calibration.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Federated rounds.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Local steps a round.")] = 6,
    keep: Annotated[
        int | None, typer.Option(min=5, help="Layers the emulator keeps; four fifths if not given.")
    ] = None,
    method: Annotated[str, typer.Option(help="What trains, such as 'lora(rank=4)' or paca.")] = "lora(rank=8)",
    learning_rate: Annotated[
        float | None, typer.Option(help="Of AdamW at the sites. (default: what suits the model)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")] = 96,
    examples: Annotated[int, typer.Option(min=1, help="Training examples of a built-in site.")] = 72,
    held_out: Annotated[
        int, typer.Option(min=1, help="Examples that each site holds out, of a fifth of its own at most.")
    ] = 16,
    exam: Annotated[
        bool,
        typer.Option(
            "--exam",
            help="Have each site hand what it holds out to the owner, as its policy says; with --tasks always.",
        ),
    ] = False,
    precision: Annotated[
        Literal["bf16", "fp32"] | None,
        typer.Option(help="Of the frozen weights. (default: what this machine computes in fastest)"),
    ] = None,
    engine: Annotated[Literal["deepspeed", "plain"], typer.Option(help="What trains at the sites.")] = "deepspeed",
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed ZeRO stage.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of data order and adapter start.")] = 0,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the merged model.")] = False,
    tasks: Annotated[
        bool,
        typer.Option(
            "--tasks", help="Learn each site's data as a task of its own, shared by two sites, after the last."
        ),
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help="What keeps earlier tasks in mind, such as none or lae. (default: lae)")
    ] = None,
    format: Annotated[Literal["text", "json"], typer.Option(help="For people, or JSON lines for programs.")] = "text",
) -> None:
    """Fetch a model and private data of four sites, tune it without any site holding it, and report.

    Starts a coordinator (Ray) and the sites as processes on loopback with certificates of their own, submits a run
    through the SDK, and writes the adapter in peft format, report.json and report.html. No example leaves its site:
    each measures on rows that it holds out, and what takes the base is measured at its side, which only a demo can do.
    With --tasks it submits a run for each task, three of the built-in ones, and says what was forgotten.
    """
    from rich.console import Console

    from offsite.client.demo.play import Demo, Settings
    from offsite.client.figures import table
    from offsite.emulator.catalogue import METHODS
    from offsite.protos.errors import InputError
    from offsite.protos.recipes import parse_one

    try:
        trained = parse_one(method)
        chosen = METHODS.make(trained.name, trained.settings)
        if not chosen.attaches:
            beside = ", ".join(name for name in METHODS if METHODS[name].attaches)
            raise InputError(f"--method {trained.name}: the demo's attack goes on from an adapter; choose of {beside}")
        if merge and not chosen.mergeable:
            raise InputError(f"--merge: what {trained.name} trains is no change of the base's weights; leave it out")
    except ValueError as error:
        raise InputError(f"--method: {error}") from None
    if memory and not tasks:
        raise InputError("--memory is for tasks that come one after the other; add --tasks, or leave it out")
    settings = Settings(
        out=out,
        model=model,
        sites=_sites(site or []),
        public=public,
        rounds=rounds,
        steps=steps,
        keep=keep,
        method=trained,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        examples=examples,
        held_out=held_out,
        exam=exam,
        precision=precision,
        engine=engine,
        zero_stage=zero_stage,
        seed=seed,
        merge=merge,
        memory=parse_one(memory or "lae") if tasks else None,
    )
    console = Console(highlight=False, quiet=format == "json")
    if tasks:
        _stream(settings, console, format)
        return
    report = Demo(settings, console, format=format).play()
    if format == "json":
        print(json.dumps({"event": "report", **report}), flush=True)
        return
    console.print(table(report))
    console.print(f"adapter: {out / 'adapter'}   report: {out / 'report.html'}, {out / 'report.json'}")


def _sites(pairs: list[str]) -> dict[str, Path]:
    """Read NAME=FILE pairs; raises InputError."""
    from offsite.protos.errors import InputError

    sites: dict[str, Path] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or name in sites or not fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise InputError(f"--site {pair}: expected NAME=FILE, each name once, of letters, digits, '.', '_', '-'")
        if name in RESERVED:
            raise InputError(f"--site {pair}: {name} is the name of another part of the demo; take another")
        sites[name] = Path(file).expanduser().resolve()
    return sites


def _stream(settings: "Settings", console: "Console", format: str) -> None:
    """Play a stream of tasks, and say what was forgotten."""
    from offsite.client.commands.eval import table
    from offsite.client.demo.stream import Stream

    stream = Stream(settings, console, format=format).stream()
    if format == "json":
        print(json.dumps({"event": "forgetting", **stream.plain()}), flush=True)
    console.print(*table(stream), sep="\n")
    console.print(f"adapter: {settings.out / 'adapter'}   plot: {settings.out / 'forgetting.svg'}")
