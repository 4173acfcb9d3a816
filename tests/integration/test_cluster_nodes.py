"""A run over two machines that share no folder, from PostgreSQL and S3, ends in the bytes of one machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import S3
from .clusters import Cluster
from .conftest import Federation, federated, wait_until, write_material
from .machines import machines

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that does no step, and one worker."""
    with machines("head", "worker") as made:
        cluster = Cluster(made, wait_until)
        cluster.start(cluster.head, cpus=0)
        cluster.start(cluster.workers[0])
        yield cluster


@pytest.fixture
def bucket(cluster: Cluster) -> Iterator[S3]:
    """A server of S3 in the head's machine."""
    server = S3(cluster.head.folder / "buckets", machine=cluster.head)
    yield server
    server.kill()


def federated_on(cluster: Cluster, bucket: S3, postgresql: Any) -> Any:
    """Return a federation in the head's machine; what the owner has is there, and in no other machine."""
    return federated(
        cluster.head.folder / "owner",
        write_material(cluster.head.folder / "material"),
        machine=cluster.head,
        OFFSITE_JOURNAL=postgresql.empty(),
        OFFSITE_BLOBS=bucket.url(cache="1G"),
        **CREDENTIALS,
        **cluster.environment(cluster.head),
    )


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "offsite", "AWS_SECRET_ACCESS_KEY": "confidential", "AWS_ALLOW_HTTP": "true"}


def finished(federation: Federation, folder: Path) -> tuple[bytes, Any]:
    """Bring a run to its end; return its adapter, and its figures."""
    material = federation.material
    exams = {name: str(material / f"{name}.jsonl") for name in ("held-out", "bank")}
    federation.have("hospital", "bank")
    with federation.connect() as session:
        spec = federation.spec(rounds=2, sites=("bank", "hospital"), evaluation=exams, merge=True)
        result = session.submit(spec).result(folder)
    report = json.loads((result / "report.json").read_text())
    merged = (result / "merged" / "model.safetensors").read_bytes()
    adapter = (result / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter + merged, [report[name] for name in ("overall", "sites", "rounds")]


def test_two_nodes_without_a_common_folder_give_the_bytes_of_one(
    cluster: Cluster, bucket: S3, postgresql: Any, federation: Federation, tmp_path: Path
) -> None:
    federation.coordinate()
    wanted = finished(federation, tmp_path / "one")
    with federated_on(cluster, bucket, postgresql) as far:
        far.coordinate("--ray-address", cluster.address, executor="ray")
        assert finished(far, tmp_path / "two")[0] == wanted[0]
    (node,) = (cluster.workers[0].folder / ".cache" / "offsite" / "nodes").iterdir()
    assert list((node / "cache" / "blake3").glob("??/*")), "the steps were done there"
    assert not list((node / "scratch").iterdir())
    everything = [path.name for path in cluster.workers[0].folder.rglob("*")]
    assert not {"owner.key", "journal.db", "policy.json", "stores.json"} & set(everything)
