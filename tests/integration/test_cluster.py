"""A Ray cluster of several machines: each a namespace of its own, none with a folder of another's."""

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from offsite.protos.errors import RunError
from offsite.protos.security.pki import Authority

from .clusters import PORT, Cluster
from .conftest import alone, wait_until
from .machines import Machine

# Calls methods of Ray's, ADDRESS/SERVICE/METHOD, without a token, and asks its environments' HTTP server.
STRANGER = """
import sys, grpc, urllib.error, urllib.request
for place in sys.argv[1:-1]:
    address, _, method = place.partition("/")
    try:
        grpc.insecure_channel(address).unary_unary("/ray.rpc." + method)(b"", timeout=5)
    except grpc.RpcError as error:
        print(error.code().name)
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[-1], data=b""), timeout=5)
except urllib.error.HTTPError as error:
    print(error.code)
"""
# Holds all cores of a cluster of one machine until it is killed, and would like as many again.
BUSY = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=2)
def hold():
    time.sleep(600)
ray.get([hold.remote(), hold.remote()])
"""
# Has the head of a cluster say that it was started with another Ray, and prints with which.
AGED = """
import json, sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
about = json.loads(client.internal_kv_get(b"CLUSTER_METADATA", b"cluster"))
print(about["ray_version"])
about["ray_version"] = sys.argv[2]
client.internal_kv_put(b"CLUSTER_METADATA", json.dumps(about).encode(), True, b"cluster")
"""


def listening(machine: Machine) -> set[int]:
    """The ports at which a machine listens."""
    return {int(line.split()[3].rpartition(":")[2]) for line in machine.run("ss", "-Hltn").stdout.splitlines()}


@pytest.mark.slow
def test_a_head_listens_where_it_says_lets_nobody_in_without_the_token_and_ends_with_what_it_started() -> None:
    with alone("head", "other") as made:
        head, other = made
        cluster = Cluster(made, wait_until)
        process = cluster.start(head)
        ports = listening(head)
        assert len(ports) == 4 and ports <= set(range(PORT, PORT + 1000))
        calls = ("InternalKVGcsService/InternalKVPut", "NodeManagerService/DrainRaylet", "ObjectManagerService/Push")
        places = [f"{head.address}:{PORT + number}/{call}" for number, call in enumerate(calls)]
        environments = f"http://{head.address}:{PORT + 3}/get_or_create_runtime_env"
        told = other.run(sys.executable, "-c", STRANGER, *places, environments)
        assert told.stdout.split() == ["UNAUTHENTICATED"] * 3 + ["401"], told
        (other.folder / "wrong").write_text("0" * 64)
        for arguments in (("up", "--join", head.address), ("status", "--address", head.address)):
            refused = other.offsite("cluster", *arguments, "--token", "wrong")
            assert (refused.returncode, refused.stderr.count("\n")) == (4, 1), refused.stderr
            assert "does not take this token" in refused.stderr
        next(one for one in head.processes if one.name() == "gcs_server").kill()
        assert process.wait(timeout=60) == 8
        assert "gcs_server [exit code=-9]" in (head.folder / "up.log").read_text()
        assert head.processes == []
        gone = head.offsite("cluster", "status", "--address", head.address)
        assert gone.returncode == 9 and "nothing answers at the Ray cluster's address" in gone.stderr


def refused(answer: Any, code: int, *words: str) -> None:
    """Expect one sentence, with these words."""
    assert (answer.returncode, answer.stderr.count("\n")) == (code, 1), answer.stderr
    assert [word for word in words if word not in answer.stderr] == [], answer.stderr


@pytest.mark.slow
def test_a_machine_with_another_ray_or_offsite_is_refused_and_told_what_the_cluster_has(cluster: Cluster) -> None:
    worker, token = cluster.workers[0], cluster.environment(cluster.workers[0])["RAY_AUTH_TOKEN_PATH"]
    join = ("cluster", "up", "--join", cluster.head.address, "--token", token, "--home", "another")
    refused(worker.offsite(*join), 11, f"a machine at {worker.address} is in the cluster at {cluster.address} already")
    package = worker.folder / "packages" / "offsite-9.9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: offsite\nVersion: 9.9.9\n")
    points = next(point for point in entry_points(group="offsite.commands") if point.name == "cluster")
    (package / "entry_points.txt").write_text(f"[offsite.commands]\ncluster = {points.value}\n")
    newer = os.environ | {"PYTHONPATH": str(package.parent)}
    refused(
        worker.offsite(*join, env=newer), 7, "has Offsite 0.1.0, and this machine Offsite 9.9.9", "install here what"
    )
    seen = worker.offsite("cluster", "status", "--address", cluster.head.address, "--token", token, env=newer)
    assert f"{worker.address} has Offsite 0.1.0, and this machine 9.9.9: no step is done there" in seen.stdout
    aged = cluster.head.run(
        sys.executable, "-c", AGED, cluster.address, "2.0.0", env=os.environ | cluster.environment(cluster.head)
    )
    version = aged.stdout.strip()
    try:
        words = ("runs Ray 2.0.0 and Python", f"this machine has Ray {version}", "install here what the cluster has")
        refused(worker.offsite(*join), 7, *words)
        kit = Authority.create(cluster.head.folder / "pki").issue("coordinator", "coordinator")
        up = ("coordinator", "up", "--identity", str(kit), "--ray-address", cluster.address)
        key = cluster.environment(cluster.head)["RAY_AUTH_TOKEN_PATH"]
        answer = cluster.head.offsite(*up, "--listen", "127.0.0.1:0", "--ray-token", key)
        refused(answer, 7, *words)
        seen = cluster.head.offsite("cluster", "status")
        assert seen.returncode == 0 and "runs Ray 2.0.0" in " ".join(seen.stdout.split())
    finally:
        cluster.head.run(
            sys.executable, "-c", AGED, cluster.address, version, env=os.environ | cluster.environment(cluster.head)
        )


@pytest.mark.slow
def test_what_listens_and_is_no_head_and_who_is_not_in_the_cluster_are_told_so(cluster: Cluster) -> None:
    head, token = cluster.head, ("--token", cluster.environment(cluster.head)["RAY_AUTH_TOKEN_PATH"])
    refused(
        head.offsite("cluster", "status", "--address", f"{head.address}:{PORT + 1}", *token),
        9,
        "is not the head of a Ray",
    )
    mute = head.popen(
        [sys.executable, "-c", "import socket, time; made = socket.create_server(('', 9999)); time.sleep(600)"]
    )
    try:
        wait_until(lambda: 9999 in listening(head), "a listener")
        refused(head.offsite("cluster", "status", "--address", f"{head.address}:9999", *token), 9, "does not answer as")
    finally:
        mute.kill()
    kit = Authority.create(head.folder / "pki-2").issue("coordinator", "coordinator")
    wrong = head.folder / "wrong"
    wrong.write_text("0" * 64)
    up = ("coordinator", "up", "--identity", str(kit), "--ray-address", cluster.address, "--listen", "127.0.0.1:0")
    refused(head.offsite(*up, "--ray-token", str(wrong)), 4, "does not take this token")


@pytest.mark.slow
def test_a_head_that_dies_costs_what_was_under_way_and_the_run_ends_as_ever(federations: Any, tmp_path: Path) -> None:
    with alone("head", "worker") as made:
        cluster = Cluster(made, wait_until)
        head, worker = made
        held = cluster.start(head)
        member = cluster.start(worker)
        with federations(head.folder / "owner", machine=head, **cluster.environment(head)) as federation:
            federation.coordinate("--ray-address", cluster.address, executor="ray")
            federation.join("hospital")
            with federation.connect() as session:
                undisturbed = session.submit(federation.spec(rounds=2)).result(tmp_path / "undisturbed")
                run = session.submit(federation.spec(rounds=2))
                next(event for event in run.watch() if event.kind == "bundle")
                next(one for one in head.processes if one.name() == "gcs_server").kill()
                assert held.wait(timeout=60) == 8
                wait_until(lambda: "its head (GCS)" in run.refresh().note, "a word of it")
                cluster.start(head)
                again = run.result(tmp_path / "again")
                assert member.wait(timeout=120) in (8, 9), "another head answers by now, or none does"
                cluster.start(worker)
                assert [machine["alive"] for machine in cluster.status()["machines"]] == [True, True]
            files = [path.relative_to(again) for path in again.rglob("*.safetensors")]
            assert files and all((again / file).read_bytes() == (undisturbed / file).read_bytes() for file in files)
            said = federation.log("coordinator").read_text()
            assert "is gone (Connection refused); the runs wait until it is started again" in said and "is back" in said


@pytest.mark.slow
@pytest.mark.long
def test_a_step_that_waits_for_a_machine_says_so_and_a_machine_that_can_do_none_says_why(
    federations: Any, tmp_path: Path
) -> None:
    with alone("head") as (head,):
        cluster = Cluster([head], wait_until)
        cluster.start(head)
        with federations(head.folder / "owner", machine=head, **cluster.environment(head)) as federation:
            federation.coordinate("--ray-address", cluster.address, executor="ray")
            federation.join("hospital")
            environment = os.environ | cluster.environment(head)
            busy = head.popen([sys.executable, "-c", BUSY, cluster.address], env=environment)
            wait_until(lambda: cluster.status()["machines"][0]["free"]["CPU"] == 0, "a machine without a free core")
            with federation.connect() as session:
                run = session.submit(federation.spec())
                wait_until(lambda: "waits until a node has 1 CPU" in run.refresh().note, "a word of it")
                assert [demand["resources"] for demand in cluster.status()["waiting"]] == [{"CPU": 2.0}]
                gone = session.submit(federation.spec())
                wait_until(lambda: "waits until a node has 1 CPU" in gone.refresh().note, "a word of the other")
                gone.cancel()
                supervised = [f"run-{gone.id}", f"run-{run.id}"]

                def left() -> list[str]:
                    names = [actor["name"].rpartition("-")[0] for actor in cluster.status()["actors"]]
                    return [name for name in supervised if name in names]

                wait_until(lambda: left() == supervised[1:], "the end of the supervisor of a cancelled run that waits")
                busy.kill()
                assert run.wait().state == "completed" and not run.note
                (asked,) = (path for path in (head.folder / "tmp").glob("offsite-*/*") if path.is_socket())
                asked.unlink()
                asked.mkdir()  # so that no step can be forked there
                with pytest.raises(RunError, match=f"machine {head.address} can do no steps: {asked}: Is a directory"):
                    session.submit(federation.spec()).wait()
