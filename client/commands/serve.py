"""`offsite serve`: published adapters beside their base, for a first look."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from offsite.client.commands.options import Format, optional

app = typer.Typer(add_completion=False)

TOKEN = "OFFSITE_SERVE_TOKEN"


@app.command()
def serve(
    base: Annotated[str, typer.Argument(help="The base: a path, a hub id, or a name from the model zoo.")],
    adapters: Annotated[
        Path | None, typer.Argument(help="A folder of folders, each an adapter or what `offsite run pull` wrote.")
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A run to fetch into that folder first; may be repeated.")
    ] = None,
    *,
    coordinator: Annotated[str | None, optional("coordinator")],
    identity: Annotated[Path | None, optional("identity")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="On loopback; 0 is any free one.")] = 8000,
    memory_mib: Annotated[int, typer.Option(min=1, help="Of all adapters that are in memory at once.")] = 1024,
    rank: Annotated[
        int, typer.Option(min=0, help="To have room for, if later adapters are larger than those there.")
    ] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of one forward pass, at most.")] = 16,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused (429).")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    precision: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="(default: what this machine computes in fastest)")
    ] = None,
    format: Format = "text",
) -> None:
    """Answer with a base and its published LoRA over OpenAI's API on loopback, for a first look.

    Requests for different adapters share forward passes; adapters are read from disk when they are asked for. The
    token is that of OFFSITE_SERVE_TOKEN, else a new one. For production: docs/serving.md.
    """
    import os
    import secrets

    from offsite.client.listening import HOST, listening
    from offsite.emulator.zoo import cache_folder, locate
    from offsite.protos.errors import InputError, NotFoundError
    from offsite.protos.output import say as tell

    if run:
        _fetch(run, adapters, coordinator, identity)
    if adapters and not adapters.is_dir():
        raise NotFoundError(f"{adapters}: there is no such folder; name one of published adapters")
    with listening(port) as bound:
        from offsite.client.serving.server import serve as answer
        from offsite.client.serving.server import service

        try:
            engine, served = service(
                locate(base, cache=cache_folder()), adapters, name=Path(base).name, precision=precision, rank=rank,
                memory_mib=memory_mib, rows=rows, waiting=waiting, most=max_tokens,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(str(error)) from error
        token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
        url = f"http://{HOST}:{bound.getsockname()[1]}/v1"

        def say() -> None:
            names = served.names()
            tell(
                format,
                {"url": url, "token": token, "models": names},
                f"serving {', '.join(names)} (Ctrl-C ends it)",
                f"export OPENAI_BASE_URL={url} OPENAI_API_KEY={token}",
            )

        answer(engine, served, token, bound, say=say)


def _fetch(runs: list[str], adapters: Path | None, coordinator: str | None, identity: Path | None) -> None:
    """Download what runs have published that is not there yet, each into a folder of its name."""
    from offsite.client.session import connect
    from offsite.protos.errors import InputError

    if adapters is None or coordinator is None or identity is None:
        raise InputError("--run needs a folder for what it fetches (ADAPTERS), --coordinator and --identity")
    with connect(coordinator, identity=identity) as session:
        for id in runs:
            if not (adapters / id).exists():
                session.run(id).result(adapters / f".{id}").rename(adapters / id)
