"""A page over a real socket, and behind it a coordinator over another, which answers with what it is given."""

import http.client
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import grpc
import pytest
import uvicorn

from offsite.client.listening import listening
from offsite.client.session import connect
from offsite.client.web import story, views
from offsite.client.web.access import Access
from offsite.client.web.app import Pages
from offsite.client.web.views import Views
from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import from_json, to_json
from offsite.protos.events import Event, data
from offsite.protos.runs_pb2_grpc import RunsServicer, add_RunsServicer_to_server
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.security.tls import server_credentials
from offsite.protos.spec import RunSpec


class Coordinator(RunsServicer):
    """Has the runs, events, sites and versions that a test gives it."""

    def __init__(self) -> None:
        self.runs: dict[str, pb.RunStatus] = {}
        self.events: dict[str, list[pb.Event]] = {}
        self.sites: list[pb.Site] = []
        self.lineage: list[pb.Version] = []
        self.refusal = ""
        self.news = threading.Condition()

    def add(self, id: str, *, state: str = "running", report: Any = None, **spec: Any) -> None:
        """Add a run of alice's."""
        document = RunSpec(model="base", **spec)
        self.events[id] = []
        self.runs[id] = pb.RunStatus(
            id=id, name=document.name, state=state, rounds=document.rounds, owner="alice", submitted_at=1.7e9,
            spec=to_json(document), report=json.dumps(report) if report else "",
        )  # fmt: skip

    def tell(self, id: str, *events: Event, state: str = "") -> None:
        """Let events happen in a run."""
        with self.news:
            for event in events:
                beside = {name: getattr(event, name) for name in ("round", "site") if hasattr(event, name)}
                plain = {name: value for name, value in data(event).items() if name not in beside}
                number = len(self.events[id]) + 1
                one = pb.Event(seq=number, at=1.7e9 + number, kind=event.kind, data=json.dumps(plain), **beside)
                self.events[id].append(one)
            self.runs[id].state = state or self.runs[id].state
            self.news.notify_all()

    def _run(self, id: str, context: Any) -> pb.RunStatus:
        if self.refusal:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, self.refusal)
        if id not in self.runs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no run '{id}'")
        return self.runs[id]

    def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.RunStatus:
        if self.refusal:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, self.refusal)
        id = request.token[:8]
        if id not in self.runs:
            spec = from_json(RunSpec, request.spec, where="run spec")
            self.add(id, state="queued", name=spec.name, rounds=spec.rounds)
        return self.runs[id]

    def Get(self, request: pb.RunId, context: Any) -> pb.RunStatus:
        return self._run(request.id, context)

    def Cancel(self, request: pb.RunId, context: Any) -> pb.RunStatus:
        self._run(request.id, context).state = "cancelled"
        return self.runs[request.id]

    def List(self, request: pb.ListRequest, context: Any) -> pb.ListReply:
        return pb.ListReply(runs=[*self.runs.values()][::-1])

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Events]:
        after = request.after
        while context.is_active() and request.id in self.runs:  # which a later test takes away
            with self.news:
                over = self.runs[request.id].state in ("completed", "failed", "cancelled")
                events = self.events[request.id][after:]
                if not events and not over:
                    self.news.wait(0.1)
            if events:
                yield pb.Events(events=events[:1000])
            after += len(events[:1000])
            if over and not events:
                return

    def Sites(self, request: pb.SitesRequest, context: Any) -> pb.SitesReply:
        return pb.SitesReply(sites=self.sites)

    def Versions(self, request: pb.VersionsRequest, context: Any) -> pb.VersionsReply:
        return pb.VersionsReply(versions=[one for one in self.lineage if request.run in ("", one.run)])

    def RollBack(self, request: pb.RollBackRequest, context: Any) -> pb.VersionsReply:
        for version in self.lineage:
            if version.round > request.round:
                version.withdrawal.CopyFrom(pb.Withdrawal(at=1.7e9, by="alice", reason=request.reason))
        return pb.VersionsReply(versions=self.lineage)


@dataclass
class Browser:
    """As much of one as the tests need: it keeps a cookie, and sends what the page would."""

    port: int
    access: Access
    headers: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def ask(self, method: str, path: str, body: str = "", **headers: str) -> Iterator[http.client.HTTPResponse]:
        """Make a request; a header is named with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, body or None, self.headers | named)
            with closing(connection.getresponse()) as answer:
                yield answer

    def login(self) -> None:
        """Come by a new link, and take the form's token from a page."""
        with self.ask("GET", f"/login?token={self.access.link()}") as answer:
            self.headers["Cookie"] = str(answer.headers["Set-Cookie"]).partition(";")[0]
        token = re.search(r'"X-Form-Token": "([\w-]+)"', self.page("/submit"))
        assert token
        self.headers |= {"X-Form-Token": token[1], "Origin": f"http://127.0.0.1:{self.port}"}

    def page(self, path: str, *, status: int = 200) -> str:
        """Return a page's text."""
        with self.ask("GET", path) as answer:
            assert answer.status == status
            return answer.read().decode()

    def post(self, path: str, **fields: str) -> tuple[int, str, str]:
        """Send a form; return the status, the text, and where to go on."""
        kind = "application/x-www-form-urlencoded"
        with self.ask("POST", path, urlencode(fields), Content_Type=kind, HX_Request="true") as answer:
            return answer.status, answer.read().decode(), answer.headers.get("HX-Location", "")

    def stream(self, path: str, until: str) -> str:
        """Read a page's stream to the end of the message that says something; return all of it."""
        text = line = ""
        with self.ask("GET", path) as answer:
            while until not in text or line.strip():
                line = answer.readline().decode()
                assert line and not line.startswith(": ping"), (
                    f"the stream ended, or is idle, without {until!r}: {text}"
                )
                text += line.removeprefix("data: ")
        return text


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    authority = Authority.create(tmp_path_factory.mktemp("kits") / "pki")
    authority.issue("coordinator", "coordinator")
    authority.issue("researcher", "alice")
    return authority.folder


@pytest.fixture(scope="module")
def _served(kits: Path) -> Iterator[tuple[Coordinator, Browser, Pages]]:
    coordinator, access = Coordinator(), Access()
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    add_RunsServicer_to_server(coordinator, server)  # type: ignore[no-untyped-call]
    port = server.add_secure_port("127.0.0.1:0", server_credentials(Identity.load(kits / "coordinator")))
    server.start()
    with connect(f"127.0.0.1:{port}", identity=kits / "alice", patience_s=0) as session, listening(0) as bound:
        pages = Pages(Views(session), access, "offsite-test")
        page = uvicorn.Server(uvicorn.Config(pages.app(), log_config=None, lifespan="off", timeout_graceful_shutdown=0))
        thread = threading.Thread(target=page.run, kwargs={"sockets": [bound]})
        thread.start()
        yield coordinator, Browser(bound.getsockname()[1], access), pages
        page.should_exit = True
        thread.join()
    server.stop(0).wait()


@pytest.fixture
def coordinator(_served: tuple[Coordinator, Browser, Pages], monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """The coordinator, without anything in it, and a page that has seen nothing of it and always asks."""
    for place, name in ((story, "STATUS_S"), (views, "SITES_S"), (views, "VERSIONS_S")):
        monkeypatch.setattr(place, name, 0.0)
    known, _, pages = _served
    pages._views = Views(pages._views.session)
    known.runs, known.events, known.sites, known.lineage, known.refusal = {}, {}, [], [], ""
    return known


@pytest.fixture
def browser(coordinator: Coordinator, _served: tuple[Coordinator, Browser, Pages]) -> Browser:
    """A browser that is logged in."""
    made = Browser(_served[1].port, _served[1].access)
    made.login()
    return made
