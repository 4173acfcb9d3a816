"""The SDK against a real server: it goes on after a restart where it was, pages lists, and trusts no answer."""

import inspect
import json
import logging
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from offsite import client
from offsite.client.answers import Artifact, Status
from offsite.client.progress import follow
from offsite.client.session import Session, connect
from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import to_json
from offsite.protos.errors import MismatchError
from offsite.protos.runs_pb2_grpc import RunsServicer, add_RunsServicer_to_server
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.security.tls import server_credentials
from offsite.protos.spec import RunSpec


class Coordinator(RunsServicer):
    """Answers with what it was given; a watch breaks off after `break_after` events, with the server."""

    def __init__(self, kit: Path) -> None:
        self.kit, self.port, self.server = kit, 0, None
        self.events: list[pb.Event] = []
        self.asked: list[int] = []
        self.status = pb.RunStatus(id="r1", state="completed", spec=to_json(RunSpec(model="m")))
        self.restarts = 0

    def start(self) -> None:
        self.server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        add_RunsServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        credentials = server_credentials(Identity.load(self.kit))
        self.port = self.server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait()

    def Get(self, request: pb.RunId, context: Any) -> pb.RunStatus:
        return self.status

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Events]:
        self.asked.append(request.after)
        for event in self.events:
            if event.seq > request.after:
                if event.kind == "restart" and not self.restarts:
                    self.restarts += 1
                    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                yield pb.Events(events=[event])

    def List(self, request: pb.ListRequest, context: Any) -> pb.ListReply:
        names = [f"r{number}" for number in range(7, 0, -1)]
        left = names[names.index(request.before) + 1 :] if request.before else names
        page = left[: min(3, request.limit or 3)]
        return pb.ListReply(runs=[pb.RunStatus(id=name) for name in page], more=len(left) > len(page))


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    authority = Authority.create(tmp_path_factory.mktemp("kits") / "pki")
    authority.issue("coordinator", "coordinator")
    authority.issue("researcher", "alice")
    return authority.folder


@pytest.fixture
def coordinator(kits: Path) -> Iterator[Coordinator]:
    made = Coordinator(kits / "coordinator")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def session(kits: Path, coordinator: Coordinator) -> Iterator[Session]:
    with connect(f"127.0.0.1:{coordinator.port}", identity=kits / "alice") as opened:
        yield opened


def event(seq: int, kind: str = "step", **data: Any) -> pb.Event:
    return pb.Event(seq=seq, kind=kind, data=json.dumps(data))


def test_a_watch_goes_on_after_a_restart_where_it_was_and_says_so(
    session: Session, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.events = [event(3), event(8), event(9, "restart"), event(12)]
    run = session.run("r1")
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        for one in run.watch():
            seen.append(one.seq)
            if one.seq == 8:
                coordinator.stop()
                coordinator.start()
    assert seen == [3, 8, 9, 12] and coordinator.asked[0] == 0 and coordinator.asked[-1] == 8
    assert "the run goes on, waiting" in caplog.text and "going on after event 8" in caplog.text


def test_a_list_is_read_page_by_page(session: Session) -> None:
    assert [run.id for run in session.runs()] == [f"r{number}" for number in range(1, 8)]
    assert [run.id for run in session.runs(limit=4)] == ["r4", "r5", "r6", "r7"]
    assert session.runs()[0].spec.model == "m", "a row of a list is brief, the rest is asked for when it is needed"


def test_what_a_status_says_is_a_dataclass(session: Session, coordinator: Coordinator) -> None:
    artifact = pb.Artifact(name="adapter/x", digest="blake3:0", size=3)
    coordinator.status = pb.RunStatus(id="r1", state="completed", round=2, rounds=2, artifacts=[artifact])
    status = session.run("r1").status
    assert isinstance(status, Status) and (status.id, status.state, status.round) == ("r1", "completed", 2)
    assert status.artifacts == (Artifact("adapter/x", "blake3:0", 3),)


def test_no_class_of_the_wire_stands_in_the_public_signatures() -> None:
    def public(name: str) -> list[Any]:
        thing = getattr(client, name)
        members = vars(thing).values() if inspect.isclass(thing) else [thing]
        functions = [getattr(one, "fget", one) for one in members if inspect.isfunction(getattr(one, "fget", one))]
        return [one for one in functions if not one.__name__.startswith("_")]

    functions = [one for name in client.__all__ for one in public(name)]
    assert len(functions) > 20
    hints = {one.__qualname__: repr(typing.get_type_hints(one)) for one in functions}
    assert not {name for name, hint in hints.items() if "_pb2" in hint}


@pytest.mark.parametrize("data", ["[1]", "{", '{"a": NaN}', "\ud7ff", "[" * 5000])
def test_an_event_or_a_report_that_is_no_table_is_a_mismatch(
    session: Session, coordinator: Coordinator, data: str
) -> None:
    coordinator.events = [pb.Event(seq=1, kind="step", data=data)]
    with pytest.raises(MismatchError, match="event 1"):
        list(session.run("r1").watch())
    coordinator.status = pb.RunStatus(id="r1", report=data)
    with pytest.raises(MismatchError, match="report"):
        session.run("r1").report  # noqa: B018


KINDS = [
    "selected",
    "step",
    "bundle",
    "figure",
    "waiting",
    "warning",
    "site",
    "update",
    "round",
    "completed",
    "x\x1b[2J",
]


@pytest.mark.parametrize("data", [{}, {"sites": 3, "step": [], "data": None, "state": {}, "sets": {"a": 1}}])
def test_events_that_nobody_understands_are_shown_as_they_are(
    session: Session, coordinator: Coordinator, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.events = [
        pb.Event(seq=n + 1, at=1e300, kind=kind, data=json.dumps(data)) for n, kind in enumerate(KINDS)
    ]
    run = session.run("r1")
    follow(run.watch(), run.spec, console=Console(width=80))
    told = capsys.readouterr().out
    assert "figure" in told and "\x1b" not in told
