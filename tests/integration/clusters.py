"""A Ray cluster of machines that share no folder, with token authentication."""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .machines import Machine, machines

PORT = 6379


class Cluster:
    """The first machine is the head. Each has the token in a file of its own."""

    def __init__(self, made: list[Machine], wait: Callable[[Callable[[], Any], str], Any]) -> None:
        self.head, self.workers = made[0], made[1:]
        self.address = f"{self.head.address}:{PORT}"
        self._token, self._wait = secrets.token_hex(32), wait

    def environment(self, machine: Machine) -> dict[str, str]:
        """What a process needs to be let in, on one of its machines."""
        file = machine.folder / "ray-token"
        if not file.exists():
            file.touch(mode=0o600)
            file.write_text(self._token)
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), "RAY_USAGE_STATS_ENABLED": "0"}

    def start(self, machine: Machine, *, cpus: int = 2) -> "subprocess.Popen[bytes]":
        """Start Ray on a machine; return once it runs."""
        role = ("--head", f"--port={PORT}") if machine is self.head else (f"--address={self.address}",)
        options = (f"--node-ip-address={machine.address}", f"--temp-dir={machine.folder}/tmp/ray", f"--num-cpus={cpus}")
        log = machine.folder / "ray.log"
        with log.open("wb") as output:
            process = machine.popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment(machine),
            )

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "--block" in log.read_text()

        self._wait(ready, f"Ray on {machine.address}")
        return process


@contextmanager
def clusters(wait: Callable[[Callable[[], Any], str], Any], *names: str) -> Iterator[Cluster]:
    """Make a cluster, with Ray started on each machine; raises OSError where no machine can be made."""
    with machines(*names) as made:
        cluster = Cluster(made, wait)
        for machine in made:
            cluster.start(machine)
        yield cluster
