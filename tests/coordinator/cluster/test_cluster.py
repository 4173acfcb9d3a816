"""`offsite cluster`, as far as no Ray is needed: what is refused at once, the token, and what a view says."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.cluster.admission import admitted, made
from offsite.coordinator.cluster.member import Member, membership
from offsite.coordinator.cluster.view import VERSION_LABEL, Actor, Demand, Machine, View, label
from offsite.coordinator.commands import cluster
from offsite.protos.addresses import parse
from offsite.protos.errors import InputError, MismatchError, NotFoundError

Offsite = Callable[..., Any]


@pytest.fixture
def unanswered() -> Iterator[str]:
    """An address at which nobody listens, nor can while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_what_cannot_be_a_cluster_is_refused_in_a_sentence(offsite: Offsite, tmp_path: Path, unanswered: str) -> None:
    home = ("--home", str(tmp_path / "home"))

    def refused(*arguments: str) -> tuple[int, str]:
        answer = offsite("cluster", *arguments, *home)
        assert answer.stdout == "" and answer.stderr.count("\n") == 1
        return answer.returncode, answer.stderr

    code, words = refused("up")
    assert code == 3 and "--listen" in words and "--join" in words
    code, words = refused("up", "--listen", "127.0.0.1")
    assert code == 3 and "a single machine needs no cluster" in words
    code, words = refused("up", "--listen", "192.0.2.1", "--memory", "lots")
    assert code == 3 and "expected one such as 16GB" in words
    code, words = refused("up", "--listen", "192.0.2.1")
    assert code == 8 and "192.0.2.1:6379: Cannot assign requested address; name an address of this machine" in words
    code, words = refused("up", "--join", "ray://192.0.2.1:6379")
    assert code == 3 and "is a URL; write HOST:PORT" in words
    code, words = refused("status")
    assert code == 6 and "this machine is in no cluster" in words
    code, words = refused("down")
    assert code == 6 and "this machine is in no cluster" in words
    code, words = refused("status", "--address", unanswered)
    assert code == 9 and f"nothing answers at the Ray cluster's address {unanswered} (Connection refused)" in words
    code, words = refused("status", "--address", unanswered, "--token", str(tmp_path / "none"))
    assert code == 3 and "no file with a cluster's token" in words


def test_the_token_is_made_once_and_is_for_this_user_alone(tmp_path: Path) -> None:
    file = made(tmp_path / "token")
    token = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600 and len(token) == 64
    file.chmod(0o666)
    assert made(file).read_text() == token and file.stat().st_mode & 0o777 == 0o600


def test_a_named_token_is_taken_before_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert "RAY_AUTH_MODE" not in admitted(None), "a cluster without tokens"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "pod's")
    assert (admitted(None)["RAY_AUTH_MODE"], admitted(None)["RAY_AUTH_TOKEN"]) == ("token", "pod's")
    file = made(tmp_path / "token")
    environment = admitted(file)
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(file) and "RAY_AUTH_TOKEN" not in environment
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="no file with a cluster's token"):
        admitted(tmp_path / "empty")


def test_a_home_without_a_process_that_holds_it_is_in_no_cluster(tmp_path: Path) -> None:
    (tmp_path / "membership.json").write_text('{"head":"192.0.2.1:6379","process":1}')
    with pytest.raises(NotFoundError, match="in no cluster"):
        membership(tmp_path)


def machine(address: str, **fields: Any) -> Machine:
    return Machine(id=address, address=address, **{"alive": True, "offsite": label(), **fields})


def test_a_head_with_another_offsite_is_not_joined(tmp_path: Path) -> None:
    member = Member(tmp_path, parse("192.0.2.2:6379"), parse("192.0.2.1:6379"))
    for version, words in (("0.0.1", "has Offsite 0.0.1, and"), ("", "has no Offsite that it tells of, and")):
        head = machine("192.0.2.1", head=True, offsite=version)
        with pytest.raises(MismatchError, match=words):
            member._fits(View(address="192.0.2.1:6379", ray="2", python="3", machines=(head,)))


def test_a_view_says_who_is_unfit_and_what_waits_for_what_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    small = machine("192.0.2.1", head=True, resources={"CPU": 4.0, "memory": 8e9}, free={"CPU": 1.0, "memory": 8e9})
    old = machine("192.0.2.2", offsite="0.0.1", resources={"CPU": 64.0})
    gone = machine("192.0.2.3", alive=False, gone="health check failed")
    waiting = (
        Demand(count=2, resources={"CPU": 4.0}, labels={VERSION_LABEL: label()}),
        Demand(count=1, resources={"CPU": 8.0, "memory": 1e9}, labels={VERSION_LABEL: label()}),
    )
    actors = (Actor(name="run-7", state="alive", address="192.0.2.1"), Actor(name="run-8", state="pending"))
    view = View(
        **{"address": "192.0.2.1:6379", "ray": "2", "python": "3", "machines": (small, old, gone)},
        **{"actors": actors, "waiting": waiting},
    )
    cluster._show(view)
    said = " ".join(capsys.readouterr().out.split())
    assert "192.0.2.1 (head) │ alive │ 3 of 4 │ │ 0 of 8 GB" in said
    assert "192.0.2.3 is gone: health check failed" in said
    assert f"192.0.2.2 has Offsite 0.0.1, and this machine {label()}: no step is done there" in said
    assert "run-7 alive on 192.0.2.1" in said and "run-8 pending on no machine yet" in said
    assert f"2 steps wait for 4 CPU, {VERSION_LABEL} {label()} 1 step" in said
    assert said.endswith(f"1 step waits for 8 CPU, 1 GB, {VERSION_LABEL} {label()}; no machine of the cluster has that")
