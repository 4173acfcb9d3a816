"""This machine as one of a Ray cluster: `up` begins or joins one and holds the machine in it, `down` lets go."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from offsite.coordinator.cluster.admission import admitted, made
from offsite.coordinator.cluster.looking import fitting, look, probe
from offsite.coordinator.cluster.view import VERSION_LABEL, View, label
from offsite.protos.addresses import Address
from offsite.protos.documents import document, from_json, to_json
from offsite.protos.errors import (
    ConflictError,
    InputError,
    MismatchError,
    NotFoundError,
    OffsiteError,
    ResourceError,
    UnreachableError,
)
from offsite.protos.ranges import Line, Place, Positive

PORT = 6379
OWN_PORTS = 4  # from the first on: the head's, then Ray's own on each machine
PORTS = 1000  # with one for each of its workers
LOOK_S = 0.5
CLOSE_S = 20.0


@document
class Membership:
    """What a machine that is in a cluster has written into its folder."""

    head: Line  # HOST:PORT
    token: Place = ""  # the file it is in; empty: in the environment
    process: Positive


@dataclass(frozen=True)
class Member:
    """A machine's place in a cluster. Resources that are None are what Ray counts here."""

    home: Path
    address: Address
    head: Address  # the same, if this is the head
    cpus: int | None = None
    gpus: int | None = None
    memory: int | None = None  # bytes that steps may claim

    def up(self, token_file: Path | None, ready: Callable[[View], None]) -> None:
        """Hold this machine in the cluster until this process is told to stop.

        Raises OffsiteError where it cannot take part, ResourceError or UnreachableError when what held it has ended.
        """
        stop = _stop()
        if self.head == self.address:
            token_file = token_file or self.home / "token"
        with _alone(self.home, Membership(head=str(self.head), token=str(token_file or ""), process=os.getpid())):
            if self.head == self.address and token_file:
                made(token_file)
            environment = admitted(token_file)
            if self.head != self.address:
                self._fits(fitting(str(self.head), environment))
            self._free()
            with self._held(environment) as process:
                while not stop.wait(LOOK_S):
                    if view := self._joined(process, environment):
                        ready(view)
                        break
                while not stop.wait(LOOK_S):
                    self._check(process)

    def _fits(self, view: View) -> None:
        """Refuse to be one of machines that have another Offsite."""
        if other := next((one for one in view.machines if one.head and one.alive and one.offsite != label()), None):
            has = f"Offsite {other.offsite}" if other.offsite else "no Offsite that it tells of"
            raise MismatchError(
                f"the head of the Ray cluster at {self.head} has {has}, and this machine Offsite {label()}: they must "
                "be the same on every machine; install here what the head has"
            )
        if view.at(self.address.host):
            raise ConflictError(f"a machine at {self.address.host} is in the cluster at {self.head} already")

    def _free(self) -> None:
        """Refuse where an address is not this machine's, or the first of its ports is taken."""
        family = socket.AF_INET6 if ":" in self.address.host else socket.AF_INET
        for port in range(self.address.port, self.address.port + OWN_PORTS):
            with socket.socket(family) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((self.address.host, port))
                except OSError as error:
                    raise ResourceError(
                        f"{Address(self.address.host, port)}: {error.strerror}; name an address of this machine, and a "
                        f"port from which {PORTS} are free"
                    ) from None

    @contextlib.contextmanager
    def _held(self, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
        program = [sys.executable, "-P", "-m", "offsite.coordinator.cluster.holding", str(os.getpid())]
        with self.log.open("wb") as output:
            process = subprocess.Popen(
                [*program, *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's, which then ends it
            )
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=CLOSE_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what of Ray's would outlive it for a while, with its ports
            process.wait()

    def _arguments(self) -> list[str]:
        host, first = self.address.host, self.address.port
        if self.head == self.address:
            role = ["--head", f"--port={first}", "--include-dashboard=false", "--no-monitor"]
        else:
            role = [f"--address={self.head}"]
        ports = {"node-manager": first + 1, "object-manager": first + 2, "runtime-env-agent": first + 3}
        sizes = {"num-cpus": self.cpus, "num-gpus": self.gpus, "memory": self.memory}
        return [
            *("start", "--block", "--disable-usage-stats", "--include-log-monitor=false", *role),
            *(f"--node-ip-address={host}", f"--temp-dir={_temporary()}", f"--labels={VERSION_LABEL}={label()}"),
            *(f"--{name}-port={port}" for name, port in ports.items()),
            *(f"--min-worker-port={first + OWN_PORTS}", f"--max-worker-port={first + PORTS - 1}"),
            *(f"--{name}={size}" for name, size in sizes.items() if size is not None),
        ]

    def _joined(self, process: "subprocess.Popen[bytes]", environment: dict[str, str]) -> View | None:
        """Return what the head sees once it counts this machine among its own."""
        self._check(process)
        with contextlib.suppress(UnreachableError):
            probe(str(Address(self.address.host, self.address.port + 1)))  # Ray's own process here, the last to listen
            view = look(str(self.head), environment)
            return view if view.at(self.address.host) else None
        return None

    def _check(self, process: "subprocess.Popen[bytes]") -> None:
        """Raise where what holds this machine has ended."""
        if process.poll() is not None:
            raise self._ended(process.returncode)

    def _ended(self, code: int) -> OffsiteError:
        if self.head != self.address:
            try:
                probe(str(self.head))
            except UnreachableError:
                return UnreachableError(
                    f"the head of the cluster, at {self.head}, is gone, and so this machine has left; join again once "
                    "it is back"
                )
        words = self.log.read_text(errors="replace").splitlines()
        which = ", ".join(word.rpartition(" -- ")[2].strip() for word in words if "[exit code=" in word)
        return ResourceError(f"Ray on this machine has ended ({which or f'exit code {code}'}); see {self.log}")

    @property
    def log(self) -> Path:
        """What Ray says on this machine."""
        return self.home / "ray.log"


def own(head: Address) -> str:
    """Return the address by which this machine reaches a head; raises UnreachableError if there is no way."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in head.host else socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((head.host, head.port))
            return str(way.getsockname()[0])
    except OSError as error:
        raise UnreachableError(f"there is no way to the cluster's head at {head} ({error.strerror or error})") from None


def membership(home: Path) -> Membership:
    """Return what this machine is a member of; raises NotFoundError."""
    file = home / "membership.json"
    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass
    except BlockingIOError:
        return from_json(Membership, file.read_bytes(), where=str(file))
    raise NotFoundError(f"{home}: this machine is in no cluster that was joined from there; name another with --home")


def down(home: Path) -> Membership:
    """End what holds this machine in its cluster, and return that; raises NotFoundError, ResourceError if it stays."""
    left = membership(home)
    os.kill(left.process, signal.SIGTERM)
    deadline = time.monotonic() + 2 * CLOSE_S
    while time.monotonic() < deadline:
        try:
            membership(home)
        except NotFoundError:
            return left
        time.sleep(LOOK_S)
    raise ResourceError(f"process {left.process} holds this machine in its cluster still; see {home / 'ray.log'}")


def _stop() -> threading.Event:
    """Return what is set once this process is told to stop: an orderly end, and so one without an error."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextlib.contextmanager
def _alone(home: Path, about: Membership) -> Iterator[None]:
    """Hold the folder for this process, and tell there what it does; the lock ends with it, however it ends."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "membership.json").open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"{home}: this machine is in a cluster already; `offsite cluster down` ends that"
            ) from None
        handle.truncate(0)
        handle.write(to_json(about))
        handle.flush()
        yield


def _temporary() -> Path:
    """Make and return Ray's folder: on this machine's disk, and short, as the paths of sockets must be."""
    folder = Path(gettempdir()) / f"offsite-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if about.st_uid != os.getuid() or folder.is_symlink():
        raise InputError(f"{folder}: it is not a folder of this account's own; look whose it is, and remove it")
    folder.chmod(0o700)
    return folder / "ray"
