"""A run over machines that share no folder, from PostgreSQL and S3, ends in the bytes of one machine."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offsite.client import Choice, Run

from ..conftest import S3
from .clusters import Cluster
from .conftest import Federation, alone, federated, wait_until, write_material

pytestmark = [pytest.mark.slow, pytest.mark.long]


KEY = {"AWS_ACCESS_KEY_ID": "offsite", "AWS_SECRET_ACCESS_KEY": "confidential", "AWS_ALLOW_HTTP": "true"}
STEPS = (("version:0", "building"), ("version:1", "aggregation"), ("version:2", "aggregation"))
CHAIN = (
    Choice(name="crash", settings={"keep": 5}),
    Choice(name="additive", settings={"group": 4, "bits": 4, "steps": 1}),
)
NOT_THEIRS = {"owner.key", "journal.db", "policy.json", "stores.json", "hospital.jsonl"}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that does no step, and two workers."""
    for name, value in KEY.items():
        monkeypatch.setenv(name, value)
    with alone("head", "left", "right") as made:
        cluster = Cluster(made, wait_until)
        for machine in made:
            cluster.start(machine, cpus=0 if machine is cluster.head else 1)
        yield cluster


@pytest.fixture
def bucket(cluster: Cluster) -> Iterator[S3]:
    """A server of S3 in the head's machine."""
    server = S3(cluster.head.folder / "buckets", machine=cluster.head)
    yield server
    server.kill()


@pytest.fixture
def far(cluster: Cluster, bucket: S3, postgresql: Any) -> Iterator[Federation]:
    """A federation in the head's machine; what the owner has is there, and in no other machine."""
    with federated(
        cluster.head.folder / "owner",
        write_material(cluster.head.folder / "material"),
        machine=cluster.head,
        OFFSITE_JOURNAL=postgresql.empty(),
        OFFSITE_BLOBS=bucket.url(cache="1G"),
        **cluster.environment(cluster.head),
    ) as made:
        yield made


def finished(federation: Federation, folder: Path, during: Callable[[Run], object] = lambda _: None) -> list[Any]:
    """Bring a run to its end; return the bytes of what is published, the figures, and what its steps spent time on."""
    exams = {name: str(federation.material / f"{name}.jsonl") for name in ("held-out", "public")}
    federation.have("hospital", "bank")
    with federation.connect() as session:
        spec = federation.spec(rounds=2, sites=("bank", "hospital"), evaluation=exams, merge=True, builders=CHAIN)
        run = session.submit(spec)
        during(run)
        result, report = Path(run.result(folder)), run.report
    spans = Counter((span["step"], span["kind"]) for span in report["spans"] if span["who"] == "coordinator")
    files = [result / name for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors")]
    return [[file.read_bytes() for file in files], report["overall"], report["sites"], [spans[step] for step in STEPS]]


def test_nodes_without_a_common_folder_give_the_bytes_of_one_though_a_node_and_then_a_gateway_dies(
    cluster: Cluster, far: Federation, federation: Federation, tmp_path: Path
) -> None:
    federation.coordinate()
    *wanted, spans = finished(federation, tmp_path / "one")
    assert spans == [1, 1, 1]
    federation.stop()
    join = ("--ray-address", cluster.address, "--part", "1kB")
    far.address = ",".join([far.coordinate(*join, name=name, home=name, executor="ray") for name in ("north", "south")])
    assert finished(far, tmp_path / "two") == [*wanted, [4, 2, 2]], (
        "in two parts, what is built once begun and finished"
    )
    for machine in cluster.workers:
        (node,) = (machine.folder / ".cache" / "offsite" / "nodes").iterdir()
        assert list((node / "cache" / "blake3").glob("??/*")), "steps were done there"
        assert not list((node / "scratch").iterdir())
        assert not NOT_THEIRS & {path.name for path in machine.folder.rglob("*")}

    def kill(run: Run) -> None:
        watched = run.watch()
        next(event for event in watched if event.kind == "update")
        cluster.workers[1].kill()
        next(event for event in watched if event.kind == "round")
        far.kill("north")
        far.expect("south", "dispatches")

    def end_ray(run: Run) -> None:
        next(event for event in run.watch() if event.kind == "bundle")
        next(one for one in cluster.workers[1].processes if one.name() == "raylet").kill()

    assert finished(far, tmp_path / "three", end_ray)[:-1] == wanted
    said = cluster.workers[1].folder / "up.log"
    wait_until(lambda: "Ray on this machine has ended (raylet [exit code=-9])" in said.read_text(), "a word of it")
    cluster.start(cluster.workers[1], cpus=1)
    assert finished(far, tmp_path / "four", kill)[:-1] == wanted
    left = f"machine {cluster.workers[1].address} has left the cluster"
    assert left in far.log("north").read_text()
