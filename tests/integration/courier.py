"""A site's end of one task: fetches its adapter and brings its update, each from where it was.

    python courier.py ADDRESS KIT TASK UPDATE FOLDER

It says what it does in lines of JSON, and halts (SIGSTOP) where a stream passes the MARKS of a file, so that whoever
started it may kill either end there.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from offsite.client.channel import Channel
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc
from offsite.protos.chunks import digest_file
from offsite.protos.documents import from_json, to_json
from offsite.protos.security.identity import Identity
from offsite.protos.spec import TaskSpec, UpdateMetrics

MARKS = 1 / 8, 5 / 8  # of a file of 128 MB: further apart than what a system keeps for a reader that halts


def say(event: str, **about: Any) -> None:
    print(json.dumps({"event": event, **about}), flush=True)


def halting(call: Any, file: str, size: int, position: Callable[[Any], int]) -> Any:
    """Make a streaming call one that halts; `position` is what its receiver had of the file before an answer came."""

    def made(request: Any, **options: Any) -> Iterator[Any]:
        start = None
        for answer in call(request, **options):
            at = position(answer)
            if start is None:
                start = at
                say(file, start=start)
            if any(start < mark * size <= at for mark in MARKS):
                start = at
                say("halt", at=at)
                os.kill(os.getpid(), signal.SIGSTOP)
            yield answer

    return made


def main(address: str, kit: Path, document: Path, update: Path, folder: Path) -> None:
    task = from_json(TaskSpec, document.read_bytes(), where="task")
    channel = Channel(address, Identity.load(kit), patience_s=60)
    channel.waiting = lambda message: say("waiting", message=message)
    fleet: Any = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]

    size = task.adapter_size
    download = halting(fleet.Download, "download", size, lambda piece: piece.offset)
    say("adapter", received=channel.download(download, task.adapter, folder / "adapter", size=size))

    size = update.stat().st_size
    metrics = to_json(UpdateMetrics(examples=1, tokens=1, loss=1.0, engine="none")).decode()
    key = pb.TaskKey(run=task.run, round=task.round, attempt=task.attempt)
    header = pb.UploadHeader(key=key, digest=digest_file(update), size=size, metrics=metrics)
    upload = halting(fleet.Upload, "upload", size, lambda state: state.kept)
    channel.upload(SimpleNamespace(Upload=upload), header, update)
    say("receipt")
    channel.close()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
