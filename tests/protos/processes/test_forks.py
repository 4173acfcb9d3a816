"""Processes that are forked for others, of a work that takes no time to import."""

import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import psutil
import pytest

from offsite.protos.errors import ResourceError
from offsite.protos.processes.forks import Forked, ForkServer, fork

WORK = """
import os, sys, threading, time

ready = []

def preload(*arguments):
    ready.extend(arguments)

def main(job):
    print(*ready, os.environ["MINE"], job.read_text(), flush=True)
    time.sleep(float(job.read_text()))
    return 7
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    """A server that listens."""
    (tmp_path / "work.py").write_text(WORK)
    paths = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    folder = Path(mkdtemp())  # shorter than pytest's: a socket's path must be
    folder.chmod(0o755)
    server = ForkServer("work", ["a", "b"], environment=paths, log=tmp_path / "log", address=folder / "socket")
    server.start()
    yield server
    server.close()
    folder.rmdir()


@pytest.mark.parametrize("trap", ["another's", "a link"])
def test_a_folder_that_waits_for_us_under_the_address_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    folder = tmp_path / "offsite"
    if trap == "a link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    server = ForkServer("work", environment={}, log=tmp_path / "log", address=folder / "socket")
    with pytest.raises(ResourceError, match="not a folder of this account's own"):
        server.start()
    assert not (tmp_path / "log").exists(), "nothing was started"


class Asker:
    """One who is not the server's owner, and asks at its address."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self.job, self.output = folder / "job", folder / "output"
        self.reading, self.leash = os.pipe()
        self._server = server

    def ask(self, seconds: float) -> Forked:
        self.job.write_text(str(seconds))
        with socket.socket(socket.AF_UNIX) as connection, self.output.open("wb") as output:
            connection.connect(str(self._server.address))
            files = {"stdin": self.reading, "stdout": output.fileno(), "stderr": output.fileno()}
            return fork(connection, self.job, {"MINE": "c"}, **files)


@pytest.fixture
def asker(server: ForkServer, tmp_path: Path) -> Asker:
    """Another one."""
    return Asker(server, tmp_path)


def test_whoever_knows_the_address_gets_a_process_and_hears_how_it_ends(asker: Asker) -> None:
    process = asker.ask(0)
    assert process.wait(30) == 7 and not process.lost
    assert asker.output.read_text() == "a b c 0\n"
    process = asker.ask(1000)
    while process.pid is None:
        pass
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


def test_only_this_account_can_reach_the_address(server: ForkServer) -> None:
    assert server.address is not None
    assert stat.S_IMODE(server.address.parent.stat().st_mode) == 0o700


def test_one_who_connects_and_asks_nothing_is_no_trouble(server: ForkServer, asker: Asker) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server.address))
    assert asker.ask(0).wait(30) == 7


def test_a_process_ends_with_its_input(asker: Asker) -> None:
    process = asker.ask(1000)
    os.close(asker.leash)
    assert process.wait(30) == 1


def test_a_server_that_is_killed_is_told_apart_and_started_again(server: ForkServer, asker: Asker) -> None:
    process = asker.ask(1000)
    while process.pid is None:
        pass
    parent = psutil.Process(process.pid).parent()
    assert parent is not None
    parent.kill()
    assert process.wait(30) == 1 and process.lost
    assert server._process is not None and server._process.wait(30) == -signal.SIGKILL
    os.close(asker.leash)
    asker.reading, asker.leash = os.pipe()
    server.start()
    assert asker.ask(0).wait(30) == 7


def test_a_server_ends_with_its_owner(server: ForkServer) -> None:
    assert server._socket is not None and server._process is not None
    server._socket.close()
    assert server._process.wait(30) == 0
