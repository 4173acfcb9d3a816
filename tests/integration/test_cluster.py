"""A Ray cluster of several machines: each a namespace of its own, none with a folder of another's."""

from typing import Any

import pytest


@pytest.mark.slow
def test_a_coordinator_on_a_cluster_finishes_a_run(cluster: Any, federations: Any, material: Any) -> None:
    head = cluster.head
    with federations(head.folder / "owner", machine=head, **cluster.environment(head)) as federation:
        federation.coordinate("--ray-address", cluster.address, executor="ray")
        federation.join("hospital")
        with federation.connect() as session:
            run = session.submit(federation.spec())
            assert (run.result(head.folder / "out") / "adapter").is_dir()
