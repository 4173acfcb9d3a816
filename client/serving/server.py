"""A base with its adapters behind a socket, until it is interrupted."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn

from offsite.client.serving.app import Service
from offsite.emulator.precision import DTYPES, Precision, fastest
from offsite.emulator.serving.engine import Engine
from offsite.emulator.serving.shelf import Shelf
from offsite.emulator.serving.slots import Slots
from offsite.emulator.zoo import load_base

END_S = 1  # that streams have to end when the server does
MIB = 1 << 20


def service(
    base: Path,
    adapters: Path | None,
    *,
    name: str,
    precision: Precision | None = None,
    memory_mib: int = 1024,
    rank: int = 0,
    rows: int = 16,
    waiting: int = 64,
    most: int = 512,
) -> tuple[Engine, Service]:
    """Load a base, on a GPU if there is one, and make room for the adapters of a folder; raises ValueError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_base(base, DTYPES[precision or fastest(device)])
    shelf = Shelf(adapters) if adapters else None
    folders = [folder for name in (shelf.names() if shelf else ()) for folder in shelf.folders(name)]  # type: ignore[union-attr]
    moved: Any = model.to(device)
    slots = Slots(moved, folders, size=memory_mib * MIB, rank=rank)
    engine = Engine(moved, slots, ends=ends(moved, tokenizer), rows=rows, waiting=waiting)
    return engine, Service(engine, shelf, tokenizer, base=name, most=most)


def ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def serve(engine: Engine, service: Service, token: str, bound: socket.socket, *, say: Callable[[], None]) -> None:
    """Serve until it is interrupted; `say` is called before."""
    config = uvicorn.Config(
        service.app(token),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=END_S,
        lifespan="off",
    )
    threading.Thread(target=engine.run, daemon=True, name="engine").start()
    say()
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        engine.close()
