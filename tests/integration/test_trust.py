"""Who gets in, and what gets in: a hostile site's own calls over real sockets."""

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client import connect
from offsite.client.channel import Channel
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc, runs_pb2, runs_pb2_grpc
from offsite.protos.errors import (
    ConflictError,
    IdentityError,
    InputError,
    MismatchError,
    NotFoundError,
    OffsiteError,
    RefusedError,
    RunError,
    UnreachableError,
)
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.transfer_pb2 import DownloadRequest


@pytest.fixture
def federation(coordinated: Any) -> Any:
    """One coordinator for all of this file."""
    return coordinated


def test_updates_that_do_not_match_are_refused_and_named_and_the_next_attempt_counts(
    federation: Any, rogue: Any
) -> None:
    with federation.connect() as session:
        run = rogue.submit(session)
        task = rogue.pull()
        good = rogue.broadcast(task)
        key = next(key for key in good if key.endswith(".B"))
        with pytest.raises(MismatchError, match=rf"update of {rogue.name}, round 1: tensor {key} .* expected F32"):
            rogue.upload(task, good | {key: good[key].T.contiguous()})
        with pytest.raises(RefusedError, match="the task is closed .failed."):
            rogue.upload(task, good)
        again = rogue.pull()
        assert (again.round, again.attempt) == (task.round, 1)
        rogue.upload(again, good)
        rogue.upload(again, good)  # acknowledged already: nothing happens
        with pytest.raises(MismatchError, match="an update was accepted before"):
            rogue.upload(again, good | {key: good[key] + 1})
        assert run.wait().state == "completed"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda good, key: good | {key: torch.full_like(good[key], float("nan"))}, "values that are not finite"),
        (lambda good, key: {k: v for k, v in good.items() if k != key}, "is missing"),
        (lambda good, key: good | {"9.evil.A": torch.zeros(1, 1)}, "9.evil.A was not asked for"),
        (lambda good, key: good | {key: torch.zeros(3000, 3000)}, "bytes announced, at most"),
        (
            lambda good, key: good | {key: torch.full_like(good[key], 1e30)},
            "a norm of .*, the run allows 1000",
        ),
    ],
)
def test_bad_values_never_reach_the_sum(federation: Any, rogue: Any, spoil: Any, words: str) -> None:
    with federation.connect() as session:
        run = rogue.submit(session)
        task = rogue.pull()
        good = rogue.broadcast(task)
        with pytest.raises(MismatchError, match=words):
            rogue.upload(task, spoil(good, next(iter(good))))
        run.cancel()


def test_an_update_of_another_origin_or_with_too_much_weight_is_refused(federation: Any, rogue: Any) -> None:
    with federation.connect() as session:
        run = rogue.submit(session)
        task = rogue.pull()
        good = rogue.broadcast(task)
        path = rogue.save(task, good, broadcast="sha256:" + "1" * 64)
        with pytest.raises(MismatchError, match="its broadcast is sha256:1111.*, expected " + task.adapter):
            rogue.channel.upload(rogue.fleet, rogue.header(task, path), path)
        task = rogue.pull()
        with pytest.raises(MismatchError, match="says it saw 1000000 examples, 16 at most were asked"):
            rogue.upload(task, good, examples=1_000_000)
        run.cancel()


def test_a_broken_upload_resumes_where_it_ended_and_a_wrong_digest_is_refused(federation: Any, rogue: Any) -> None:
    with federation.connect() as session:
        run = rogue.submit(session)
        task = rogue.pull()
        path = rogue.save(task, rogue.broadcast(task))
        header = rogue.header(task, path)
        half = path.stat().st_size // 2
        data = path.read_bytes()

        def begin() -> Iterator[pb.UploadPart]:
            yield pb.UploadPart(header=header)
            yield pb.UploadPart(offset=0, data=data[:half])

        with pytest.raises(InputError, match=f"{half} of {len(data)} bytes came; resume"):
            list(rogue.channel.stream(rogue.fleet.Upload, begin()))
        state = next(rogue.channel.stream(rogue.fleet.Upload, iter([pb.UploadPart(header=header)])))
        assert (state.kept, state.digest) == (half, "")

        def jump() -> Iterator[pb.UploadPart]:
            yield pb.UploadPart(header=header)
            yield pb.UploadPart(offset=half + 1, data=data[half + 1 :])

        with pytest.raises(UnreachableError, match=f"chunk at byte {half + 1}, expected at {half}; resume"):
            list(rogue.channel.stream(rogue.fleet.Upload, jump()))
        rogue.channel.upload(rogue.fleet, header, path)
        (state,) = rogue.channel.stream(rogue.fleet.Upload, iter([pb.UploadPart(header=header)]))
        assert state.digest == header.digest, "it is acknowledged again, and not sent again"
        assert run.wait().state == "completed"

        run = rogue.submit(session)
        task = rogue.pull()
        with pytest.raises(MismatchError, match="announced was sha256:0000"):
            rogue.upload(task, rogue.broadcast(task), digest="sha256:" + "0" * 64)
        run.cancel()


def test_a_site_downloads_the_files_of_its_own_task_and_no_other(federation: Any, rogue: Any) -> None:
    with federation.connect() as session:
        run = rogue.submit(session)
        task = rogue.pull()
        rogue.upload(task, rogue.broadcast(task))
        digest = next(a.digest for a in run.wait().status.artifacts if a.name.endswith("safetensors"))
    for wanted in (digest, task.adapter, "sha256:" + "0" * 64, "../journal.db"):
        with pytest.raises(NotFoundError):
            list(rogue.channel.stream(rogue.fleet.Download, DownloadRequest(digest=wanted)))


def test_roles_are_kept_apart_and_revoked_or_foreign_kits_get_nowhere(federation: Any, rogue: Any) -> None:
    runs: Any = runs_pb2_grpc.RunsStub(rogue.channel.grpc)  # type: ignore[no-untyped-call]
    with pytest.raises(
        RefusedError,
        match=f"{rogue.name} has a certificate for role site; this call needs role owner, researcher or auditor",
    ):
        rogue.channel.call(runs.List, runs_pb2.ListRequest())
    researcher = Channel(federation.address, Identity.load(federation.researcher), patience_s=5)
    fleet: Any = fleet_pb2_grpc.FleetStub(researcher.grpc)  # type: ignore[no-untyped-call]
    with pytest.raises(RefusedError, match="needs role site"):
        researcher.call(fleet.Enrol, pb.EnrolRequest())
    researcher.close()

    stranger = Authority.create(federation.folder / "foreign").issue("researcher", "mallory")
    with pytest.raises(IdentityError), connect(federation.address, identity=stranger, patience_s=2) as session:
        session.runs()

    federation.authority.revoke(rogue.name)
    with pytest.raises(IdentityError, match=f"{rogue.name!r} is revoked"):
        rogue.channel.call(rogue.fleet.PullTask, pb.PullTaskRequest(wait_s=0))


def test_a_revoked_site_loses_what_it_has_open(federation: Any, rogue: Any) -> None:
    waiting = type(rogue)(federation, f"{rogue.name}-waiting")
    with federation.connect() as session, ThreadPoolExecutor() as pool:
        run = rogue.submit(session)
        task = rogue.pull()
        path = rogue.save(task, rogue.broadcast(task))
        data, sent, go_on = path.read_bytes(), threading.Event(), threading.Event()

        def slowly() -> Iterator[pb.UploadPart]:
            yield pb.UploadPart(header=rogue.header(task, path))
            yield pb.UploadPart(offset=0, data=data[:100])
            sent.set()
            go_on.wait(60)
            yield pb.UploadPart(offset=100, data=data[100:])

        upload = pool.submit(lambda: list(rogue.channel.stream(rogue.fleet.Upload, slowly())))
        poll = pool.submit(waiting.pull)
        assert sent.wait(60)
        for name in (rogue.name, waiting.name):
            federation.authority.revoke(name)
        go_on.set()
        for call, name in ((upload, rogue.name), (poll, waiting.name)):
            with pytest.raises(IdentityError, match=f"{name!r} is revoked"):
                call.result(timeout=60)
        run.cancel()
    waiting.channel.close()


@pytest.mark.slow(alone=True)
def test_a_site_that_goes_back_and_forth_gets_no_further(federation: Any, rogue: Any) -> None:
    with federation.connect() as session:
        run = rogue.submit(session, stall_s=2.0)
        task = rogue.pull()
        key = pb.TaskKey(run=task.run, round=task.round, attempt=task.attempt)

        def report(step: int, **more: Any) -> bool:
            request = pb.ReportRequest(key=key, state=pb.TRAINING, step=step, steps=4, **more)
            return bool(rogue.channel.call(rogue.fleet.Report, request).stop)

        with pytest.raises(InputError, match="report: step 5 of 4, the task has 4"):
            report(5)
        with pytest.raises(InputError, match="report: bytes_down|bytes_down: "):
            report(1, bytes_down=2**63)
        turns = 0
        while not report(1 + turns % 2):
            turns += 1
        assert turns > 3
        with pytest.raises(RunError, match="got no further for 2 s"):
            run.wait()
        assert sum(event.kind == "site" for event in run.watch()) < 8
    endless = pb.UploadHeader(key=pb.TaskKey(run="x" * 4_000_000))
    with pytest.raises(InputError, match="run: 4000000 characters came, at most 128"):
        list(rogue.channel.stream(rogue.fleet.Upload, iter([pb.UploadPart(header=endless)])))


def test_nothing_older_than_tls_1_3_is_spoken(federation: Any, rogue: Any) -> None:
    versions = {}
    for most in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=str(rogue.kit / "ca.crt"))
        context.load_cert_chain(rogue.kit / "tls.crt", rogue.kit / "tls.key")
        context.set_alpn_protocols(["h2"])
        context.maximum_version = most
        host, _, port = federation.address.rpartition(":")
        with socket.create_connection((host, int(port))) as plain, contextlib.suppress(OSError):
            with context.wrap_socket(plain, server_hostname=host) as secured:
                versions[most] = secured.version()
    assert versions == {ssl.TLSVersion.TLSv1_3: "TLSv1.3"}


def test_a_run_that_cannot_be_done_is_refused_before_anything_is_trained(federation: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"txt": "wrong"}\n')
    choice = federation.spec().method.__class__
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": str(tmp_path / "empty")}, r"no .*\.safetensors"),
        ({"model": str(tmp_path / "none")}, "no such folder"),
        ({"model": "smolm2"}, "a name in the zoo"),
        ({"evaluation": {"x": str(tmp_path / "broken.jsonl")}}, "broken.jsonl, line 2"),
        ({"public": ""}, "the builder crash looks at how the model reads text"),
        ({"builders": (choice(name="magic"),)}, "magic.*crash"),
        ({"builders": (choice(name="crash", settings={"kep": 5}),)}, "kep"),
        ({"builders": (choice(name="quantised"), choice(name="crash"))}, "crash cannot follow quantised"),
        ({"builders": (choice(name="whole"), choice(name="distilled"))}, "put crash or loram or uniform before it"),
        ({"trainable": choice(name="middle")}, "there is no placement 'middle'; known are ends, kept, spread"),
        ({"method": choice(name="grids")}, "put sketch among the builders"),
        (
            {"strategy": choice(name="mean")},
            "cannot average method lora, .* by product; use one of: factor-mean, low-rank",
        ),
        ({"realign_steps": 5}, "put distilled last in builders"),
        ({"method": choice(name="lora", settings={"rank": 0})}, "rank"),
        ({"strategy": choice(name="median")}, "factor-mean, .*low-rank, mean"),
        (
            {
                "strategy": choice(name="factor-mean"),
                "sites": ("a", "b"),
                "method": choice(name="lora", settings={"rank": 4, "ranks": {"a": 2}}),
            },
            "needs sites of one tier, these have r2, r4; use one of: low-rank",
        ),
        ({"sites": ("a", "a")}, "twice"),
        ({"sites": ("a",), "min_sites": 2}, "only 1 sites are named"),
    ]
    with federation.connect() as session:
        before = len(session.runs())
        for changes, words in wrong:
            with pytest.raises(InputError, match=words):
                session.submit(federation.spec(**changes))
        assert len(session.runs()) == before
        run = session.submit(federation.spec(), token="t")
        with pytest.raises(ConflictError, match=f"used before, for run {run.id}"):
            session.submit(federation.spec(rounds=7), token="t")
        run.cancel()


@pytest.mark.slow(alone=True)
def test_a_taken_port_and_a_taken_folder_are_said_to_be_so(federation: Any) -> None:
    kit = str(federation.folder / "pki" / "coordinator")

    def up(home: str, listen: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "offsite.client", "coordinator", "up", "--identity", kit]
        more = ["--home", str(federation.folder / home), "--listen", listen, "--executor", "threads"]
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)

    taken = up("other", federation.address)
    assert taken.returncode == 8 and f"cannot listen on {federation.address}" in taken.stderr
    assert taken.stderr.count("\n") == 1
    twice = up("home", "127.0.0.1:0")
    assert twice.returncode == 8 and "another coordinator is using this folder" in twice.stderr


def test_nobody_there_is_said_to_be_so(federation: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with connect(address, identity=federation.researcher, patience_s=0.5) as session:
        with pytest.raises(OffsiteError, match="nothing listens there") as caught:
            session.runs()
    assert caught.value.exit_code == 9
