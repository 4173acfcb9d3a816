"""A Ray cluster of machines that share no folder, with token authentication."""

import json
import secrets
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .machines import Machine

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
        """Have a machine begin the cluster or join it; return what holds it there, once it is in."""
        role = ("--listen", machine.address) if machine is self.head else ("--join", self.head.address)
        token = self.environment(machine)["RAY_AUTH_TOKEN_PATH"]
        program = [sys.executable, "-m", "offsite.client", "cluster", "up"]
        log = machine.folder / "up.log"
        with log.open("wb") as output:
            process = machine.popen(
                [*program, *role, "--token", token, "--cpus", str(cpus), "--memory", "2GB", "--format", "json"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return '"ready"' in log.read_text()

        self._wait(ready, f"the cluster on {machine.address}")
        return process

    def status(self) -> Any:
        """Return what `offsite cluster status` says of it."""
        return json.loads(self.head.offsite("cluster", "status", "--format", "json").stdout)
