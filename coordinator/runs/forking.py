"""Steps in processes of their own, forked from one that has imported what they need. Imports no tensor library."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from offsite.coordinator.node import Node
from offsite.coordinator.runs.supervisor import Lost
from offsite.coordinator.store import Unusable
from offsite.protos.chunks import digest_bytes, hex_of
from offsite.protos.documents import plain
from offsite.protos.errors import from_status
from offsite.protos.processes.forks import ForkServer, fork


def fork_server(node: Node) -> ForkServer:
    """Return what the steps of a node are forked from, for whoever knows its folder."""
    work = "offsite.coordinator.runs.steps.process"
    return ForkServer(work, environment={}, log=_log(node), address=address(node.root))


def _log(node: Node) -> Path:
    return node.root / f"steps-{socket.gethostname()}.log"


def _words(node: Node) -> str:
    """Return the last words of what steps are forked from, and where more of them are; empty if it had none."""
    with suppress(OSError):
        if words := _log(node).read_text(errors="replace").strip():
            return f": {plain(words.splitlines()[-1], most=300)} (see {_log(node)})"
    return ""


def address(root: Path) -> Path:
    """Where that is asked: a short path, as that of a socket must be, on a disk of this machine."""
    return Path(gettempdir()) / f"offsite-{os.getuid()}" / hex_of(digest_bytes(str(root).encode()), most=16)


def perform(
    threads: int, node: Node, step: str, spec: bytes, order: bytes, *, log: dict[str, Any], **environment: str
) -> bytes:
    """Do a step in a process forked for it, which ends with this one at the latest; return its result.

    `log` has the form of what it logs, and what that is about; `environment` is set before it touches a GPU.
    Raises the step's own error, or Lost if its process could not begin or was killed.
    """
    scratch = node.prepare().scratch
    job: dict[str, Any] = {"threads": threads, "root": str(node.root), "blobs": node.url, "log": log}
    job |= {"step": step, "spec": spec.decode(), "order": order.decode()}
    (stdin, leash), (output, stdout) = os.pipe(), os.pipe()
    with os.fdopen(leash, "wb"), os.fdopen(output, "rb") as pipe, TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "job.json"
        try:
            path.write_text(json.dumps(job))
            with socket.socket(socket.AF_UNIX) as server:
                try:
                    server.connect(str(address(node.root)))
                except OSError as gone:
                    raise Lost(f"step {step}: what it is forked from has ended{_words(node)}") from gone
                process = fork(server, path, environment, stdin=stdin, stdout=stdout, stderr=2)
        finally:
            os.close(stdin)
            os.close(stdout)
        document = pipe.read()
        if code := process.wait():
            if process.lost:
                raise Lost(f"step {step}: what it is forked from ended under it{_words(node)}")
            raise Lost(f"step {step}: its process ended with exit code {code}")
    outcome = json.loads(document)
    if error := outcome.get("error"):
        if error["unusable"]:
            raise Unusable(error["message"])
        raise from_status(error["status"], error["message"], reason=error["reason"])
    return str(outcome["result"]).encode()
