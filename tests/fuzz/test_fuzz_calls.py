"""Live calls: whatever a site or a person sends to the real services, the answer is a reply or an error of ours.

The services run on a real journal; what gRPC does itself (TLS, framing, UTF-8) is not fuzzed here.
"""

import asyncio
import inspect
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from offsite.coordinator.home import Home
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.service.answer import Gate
from offsite.coordinator.service.fleet import FleetService
from offsite.coordinator.service.limits import Limits
from offsite.coordinator.service.membership import MembershipService
from offsite.coordinator.service.people import RunsService
from offsite.coordinator.store.changes import Changes
from offsite.coordinator.store.journal import Key
from offsite.coordinator.store.tables import requests, runs, tasks
from offsite.protos import fleet_pb2, membership_pb2, runs_pb2, transfer_pb2
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import canonical, from_json, to_json
from offsite.protos.events import Completed
from offsite.protos.frames import Piece, read_part, write
from offsite.protos.security.pki import Authority
from offsite.protos.security.revocation import Revocations
from offsite.protos.security.signing_requests import new_request
from offsite.protos.spec import RunSpec, TaskSpec

from .hostile import NUMBERS, as_json, changed, told, values
from .test_fuzz_documents import MANIFEST, RUN, TASK

KEY = Key(run="live", round=0, site="bank", attempt=0)
ADAPTER = b"adapter"


class Context:
    """What gRPC hands a servicer: the caller's certificate, and how to end a call or to send more."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate, self.answers = certificate, 0

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate]}

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), details
        told(Exception(details))
        raise grpc.aio.AbortError

    async def write(self, answer: Any) -> None:
        self.answers += 1


class Coordinator:
    """Both services over one home, with a run that is live and one that is over, as before every call."""

    def __init__(self, folder: Path) -> None:
        authority = Authority.create(folder / "pki")
        kit = authority.issue("coordinator", "coordinator")
        self.home = Home(folder / "home", kit).prepare()
        self.journal, blobs = self.home.journal(), self.home.blobs()
        for name, data in (("manifest", canonical({})), ("adapter", ADAPTER)):
            (folder / name).write_bytes(data)
            blobs.take(folder / name)
        task = {**TASK, "run": "live", "site": "bank", "adapter": digest_bytes(ADAPTER)}
        task |= {"adapter_size": len(ADAPTER), "update_size": len(ADAPTER)}
        manifest = to_json(MANIFEST)
        (folder / "listed").write_bytes(manifest)
        blobs.take(folder / "listed")
        task |= {"manifest": digest_bytes(manifest), "manifest_size": len(manifest)}
        self.task = to_json(from_json(TaskSpec, as_json(task), where="task"))
        spec = to_json(RunSpec(model="m"))
        for run in ("live", "done"):
            self.journal.add_run(run, token=run, owner="alice", spec=spec)
        self.journal.end_run("done", Completed())
        self.journal.add_task(KEY, spec=self.task, signature=b"s")
        revocations = Revocations(kit / "crl.pem", seen=self.home.root / "crl-number")
        self.gate = Gate(revocations)
        changes = Changes(self.journal)
        self.fleet = FleetService(self.home, self.journal, blobs, self.gate, changes)
        self.people = RunsService(self.journal, blobs, self.gate, changes, policy=OwnerPolicy())
        self.certificates = {
            name: (authority.issue(role, name) / "tls.crt").read_bytes()  # type: ignore[arg-type]
            for role, name in (("site", "bank"), ("owner", "alice"))
        }
        token = authority.token("site", "ward", address="127.0.0.1:1")
        self.certificates["ward"] = token.files["tls.crt"]
        ca = token.files["ca.crt"]
        self.membership = MembershipService(self.journal, self.gate, changes, revocations, authority=ca)
        self.lists = [authority.newest().pem, token.files["crl.pem"]]
        self.loop = asyncio.new_event_loop()

    def renew(self) -> None:
        """Make the live run and its task open again, and forget runs that were submitted."""
        self.gate._limits = Limits()  # a fuzzer calls faster than anybody may
        with self.journal._engine.begin() as connection:
            connection.execute(sa.update(runs).where(runs.c.id == "live").values(state="running"))
            connection.execute(sa.update(tasks).values(state="training", step=0, bytes_down=0))
            connection.execute(sa.delete(runs).where(runs.c.id.not_in(("live", "done"))))
            connection.execute(sa.delete(requests))

    def call(self, method: Any, request: Any, caller: str) -> list[Any]:
        context = Context(self.certificates[caller])

        async def answer() -> list[Any]:
            try:
                made = method(request, context)
                return [one async for one in made] if inspect.isasyncgen(made) else [await made]
            except grpc.aio.AbortError:
                return []

        return self.loop.run_until_complete(asyncio.wait_for(answer(), 20))


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Coordinator(tmp_path_factory.mktemp("calls"))
    yield made
    made.loop.close()
    made.journal.close()


small = st.sampled_from([0, 1, 2, 4, 2**31 - 1, 2**31, 2**32 - 1])
large = small | st.sampled_from([2**53, 2**63 - 1, 2**63, 2**64 - 1])
reals = st.floats() | st.sampled_from([0.0, 1e308, -1.0])
words = st.sampled_from(["live", "done", "bank", "", "\x00", "\x1b[2J", "../x", "sha256:" + "0" * 64, "a" * 5000])
words |= st.text(max_size=20) | st.just(digest_bytes(ADAPTER)) | st.just(1_000_000).map("x".__mul__)
keys = st.just(fleet_pb2.TaskKey(run="live")) | st.builds(fleet_pb2.TaskKey, run=words, round=small, attempt=small)
metrics = st.builds(lambda value: as_json(value).decode(), values) | words
headers = st.builds(fleet_pb2.UploadHeader, key=keys, digest=words, size=large, metrics=metrics)
pieces = st.builds(Piece, offset=large, data=st.binary(max_size=50)).map(write)
parts = st.builds(fleet_pb2.UploadPart, header=headers, offset=large).map(write) | pieces
held = st.binary(max_size=99) | st.just(bytes(64))
downloads = st.builds(transfer_pb2.DownloadRequest, digest=words, offset=large, held=held)
specs = changed(RUN).map(as_json) | st.binary(max_size=50) | st.sampled_from([b"[" * 99_999, b"9" * 5000])

FLEET = {
    "Enrol": st.builds(fleet_pb2.EnrolRequest, version=words, policy=words, examples=large),
    "PullTask": st.builds(fleet_pb2.PullTaskRequest, wait_s=reals),
    "Download": downloads,
    "Upload": st.lists(parts, max_size=4),
    "Report": st.builds(
        fleet_pb2.ReportRequest,
        **{"key": keys, "state": st.integers(0, 9), "step": small, "steps": small, "loss": reals},
        **{"reason": st.integers(0, 99), "bytes_down": large},
    ),
}
PEOPLE = {
    "Submit": st.builds(runs_pb2.SubmitRequest, token=words, spec=specs),
    "Get": st.builds(runs_pb2.RunId, id=words),
    "List": st.builds(runs_pb2.ListRequest, limit=small, before=words),
    "Watch": st.builds(runs_pb2.WatchRequest, id=words.filter(lambda word: word != "live"), after=large),
    "Cancel": st.builds(runs_pb2.RunId, id=words),
    "Fetch": downloads,
    "Sites": st.just(runs_pb2.SitesRequest()),
}


CSR = new_request(ec.generate_private_key(ec.SECP256R1()))
csrs = (
    st.just(CSR) | st.binary(max_size=60) | st.builds(lambda at, piece: CSR[:at] + piece + CSR[at + 1 :], small, held)
)
signings = st.builds(membership_pb2.SigningRequest, request=csrs, wait_s=st.sampled_from([0.0, -1.0, 1e308, math.nan]))
answers = st.builds(membership_pb2.Signed, caller=words, key=words, certificate=held, refusal=words)
MEMBERSHIP = {
    "Join": signings,
    "Renew": signings,
    "Revocations": st.builds(membership_pb2.RevocationsRequest, number=large),
    "Unsigned": st.just(membership_pb2.UnsignedRequest()),
    "Sign": st.builds(membership_pb2.SignRequest, answers=st.lists(answers, max_size=3), revocations=held),
}
CALLERS = {"Join": {"ward"}, "Unsigned": {"alice"}, "Sign": {"alice"}}  # all others: any but who holds a token


async def stream(messages: list[bytes]) -> AsyncIterator[Any]:
    for message in messages:
        yield read_part(message)


@given(data=st.data())
def test_what_a_site_sends(coordinator: Coordinator, data: st.DataObject) -> None:
    coordinator.renew()
    name = data.draw(st.sampled_from(sorted(FLEET)))
    request = data.draw(FLEET[name])
    caller = data.draw(st.sampled_from(["bank", "bank", "bank", "alice"]))
    method = getattr(coordinator.fleet, name)
    for answer in coordinator.call(method, stream(request) if name == "Upload" else request, caller):
        assert caller == "bank", f"{name} answered {answer} to one who is no site"
    assert sum(1 for _ in coordinator.home.spool.iterdir()) <= 2


@given(data=st.data())
def test_what_a_person_sends(coordinator: Coordinator, data: st.DataObject) -> None:
    coordinator.renew()
    name = data.draw(st.sampled_from(sorted(PEOPLE)))
    request = data.draw(PEOPLE[name])
    caller = data.draw(st.sampled_from(["alice", "alice", "alice", "bank"]))
    for answer in coordinator.call(getattr(coordinator.people, name), request, caller):
        assert caller == "alice", f"{name} answered {answer} to one who is no person"
        if isinstance(answer, runs_pb2.Event):
            json.loads(answer.data, parse_constant=lambda constant: pytest.fail(constant))
    (page,) = coordinator.call(coordinator.people.List, runs_pb2.ListRequest(), "alice")
    assert {run.id for run in page.runs} >= {"live", "done"} and page.ByteSize() < 4 << 20


@given(data=st.data())
def test_what_is_asked_of_an_authority(coordinator: Coordinator, data: st.DataObject) -> None:
    coordinator.renew()
    name = data.draw(st.sampled_from(sorted(MEMBERSHIP)))
    request = data.draw(MEMBERSHIP[name])
    if name == "Sign" and data.draw(st.booleans()):
        request.revocations = data.draw(st.sampled_from(coordinator.lists))
    caller = data.draw(st.sampled_from(["alice", "bank", "ward"]))
    for answer in coordinator.call(getattr(coordinator.membership, name), request, caller):
        assert caller in CALLERS.get(name, {"alice", "bank"}), f"{name} answered {answer} to {caller}"
        assert not getattr(answer, "certificate", b""), "nobody has signed"
        if name in ("Join", "Renew"):
            assert len(coordinator.journal.unsigned(most=9)) == 1


def test_numbers_are_beyond_the_database_and_the_wire() -> None:
    assert max(NUMBERS) > 2**64
