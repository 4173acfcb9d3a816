"""Machines for tests: each a network, mount and process namespace of its own, with a cable to one switch.

A machine has a folder of its own, which is its home and holds its temporary files. All else it can only read, and the
other machines' folders it does not see. It ends, with each of its processes, when it is killed or this process ends.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

# The first process of a machine sets it up, then reaps whatever is orphaned, until its input ends. `$1` is the
# machine's own folder, what follows are the others'.
MACHINE = """
set -e
mount --bind "$1" "$1"
shift
for other; do mount -t tmpfs -o ro none "$other"; done
mount -o remount,bind,ro /
mount -t tmpfs none /dev/shm
ip link set lo up
echo up
exec "$python" -S -c "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); sys.stdin.read()"
"""
SWITCH = """
set -e
ip link add switch type bridge
ip address add 10.77.0.254/24 dev switch
ip link set switch up
echo up
exec cat
"""
CABLE = """
set -e
ip link add cable$1 type veth peer name eth0 netns $2
ip link set cable$1 master switch up
"""
# Takes connections at a socket that was made outside, and hands them on inside.
RELAY = """
import asyncio, socket, sys

async def pump(reader, writer):
    try:
        while block := await reader.read(1 << 16):
            writer.write(block)
            await writer.drain()
    except OSError:
        pass
    writer.close()

async def take(reader, writer):
    try:
        there = await asyncio.open_connection(*sys.argv[2:])
    except OSError:
        return writer.close()
    await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

async def main():
    server = await asyncio.start_server(take, sock=socket.socket(fileno=int(sys.argv[1])))
    await server.serve_forever()

asyncio.run(main())
"""


class Namespace:
    """A first process, in namespaces of its own, that runs a script of the shell, says `up` and ends with its input."""

    def __init__(self, *kinds: str, script: str, arguments: tuple[str, ...] = ()) -> None:
        """Raise OSError, in the system's words, where it may not be made."""
        self._holder = subprocess.Popen(
            ["unshare", *kinds, "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"python": sys.executable},
        )
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != b"up\n":
            raise OSError(self._holder.stderr.read().decode().strip())
        self.pid = psutil.Process(self._holder.pid).children()[0].pid

    def end(self) -> None:
        """End all that runs in it, at once."""
        self._holder.kill()
        self._holder.communicate()


class Inside(subprocess.Popen[bytes]):
    """A process in a machine: signals go to it, and not to the process that entered with it and waits for it."""

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.pid).children():
                process.send_signal(number)


class Machine:
    """One of several. `address` is its own on the network; `folder` is what it alone may see and write to."""

    def __init__(self, switch: Namespace, number: int, folder: Path, others: list[Path]) -> None:
        self._switch, self._number, self.folder, self._others = switch, number, folder, others
        self.address = f"10.77.0.{number}"
        self._started: list[Inside] = []
        self._relays: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        self.boot()

    def boot(self) -> None:
        """Start it, with what is on its disk."""
        (self.folder / "tmp").mkdir(exist_ok=True)
        folders = (str(self.folder), *map(str, self._others))
        self._inside = Namespace("--net", "--mount", "--mount-proc", script=MACHINE, arguments=folders)
        cable = ["sh", "-c", CABLE, "sh", str(self._number), str(self._inside.pid)]
        subprocess.run([*_enter(self._switch.pid, "--net"), *cable], check=True)
        for command in (f"ip address add {self.address}/24 dev eth0", "ip link set eth0 up"):
            subprocess.run(self.enter(*command.split()), check=True)

    def enter(self, *command: str) -> list[str]:
        """Return the command that runs another one in this machine."""
        environment = ["-C", str(self.folder), f"HOME={self.folder}", f"TMPDIR={self.folder / 'tmp'}"]
        return [*_enter(self._inside.pid, "--net", "--mount", "--pid"), "env", *environment, *command]

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, and return what it says."""
        return subprocess.run(self.enter(*command), capture_output=True, text=True, check=False, **options)

    def offsite(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `offsite` to its end."""
        return self.run(sys.executable, "-m", "offsite.client", *arguments, **options)

    def popen(self, command: list[str], **options: Any) -> "Inside":
        """Start a command, as `subprocess.Popen` does."""
        self._started.append(Inside(self.enter(*command), **options))
        return self._started[-1]

    def open(self, address: str) -> str:
        """Return an address on loopback, outside, behind which is one inside, until the machine ends."""
        if address not in self._relays:
            host, port = address.rsplit(":", 1)
            with socket.create_server(("127.0.0.1", 0)) as server:
                relay = [sys.executable, "-c", RELAY, str(server.fileno()), host, port]
                command = [*_enter(self._inside.pid, "--net"), *relay]
                self._relays[address] = subprocess.Popen(command, pass_fds=[server.fileno()]), server.getsockname()[1]
        return f"127.0.0.1:{self._relays[address][1]}"

    @property
    def processes(self) -> list[psutil.Process]:
        """All that runs in it, by the numbers that they have outside."""
        inside = _space(self._inside.pid)
        return [one for one in psutil.process_iter() if one.pid != self._inside.pid and _space(one.pid) == inside]

    def kill(self) -> None:
        """End it as a power cut would."""
        self._inside.end()
        for relay, _ in self._relays.values():
            relay.kill()
            relay.wait()
        for process in self._started:
            process.wait()
        self._relays.clear()
        self._started.clear()

    def unplug(self) -> None:
        """Pull its cable."""
        cable = ("ip", "link", "set", f"cable{self._number}", "down")
        subprocess.run([*_enter(self._switch.pid, "--net"), *cable], check=True)


@contextmanager
def machines(*names: str) -> Iterator[list[Machine]]:
    """Make machines on one network; raises OSError where the system lets us make none."""
    root = Path(tempfile.mkdtemp(prefix="offsite-", dir="/tmp"))  # the paths of Ray's sockets must be short
    made: list[Machine] = []
    try:
        for name in names:
            (root / name).mkdir()
        switch = Namespace("--net", script=SWITCH)
        try:
            for number, name in enumerate(names, 1):
                made.append(Machine(switch, number, root / name, [root / other for other in names if other != name]))
            yield made
        finally:
            for machine in made:
                machine.kill()
            switch.end()
    finally:
        shutil.rmtree(root)


def _enter(pid: int, *kinds: str) -> list[str]:
    return ["nsenter", f"--target={pid}", *kinds]


def _space(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
