"""Ray at arm's length, as far as no Ray is needed: what is refused at once."""

import socket
from pathlib import Path

import pytest

from offsite.coordinator.cluster.looking import check
from offsite.coordinator.cluster.view import Machine, View
from offsite.coordinator.home import Home
from offsite.coordinator.runs.cluster import OnRay
from offsite.protos.errors import InputError, UnreachableError


def test_a_cluster_that_is_not_there_is_refused_before_ray_is_asked(tmp_path: Path) -> None:
    home = Home(tmp_path, tmp_path).prepare()
    with socket.socket() as taken:  # bound, so that nobody else listens there, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ray = OnRay(home, address=address)
        with pytest.raises(UnreachableError, match=f"nothing answers at the Ray cluster's address {address} .*refused"):
            ray.start()
    assert "has not started" in ray.fault and not (tmp_path / "ray.log").exists()
    with pytest.raises(InputError, match="is a URL; write HOST:PORT"):
        OnRay(home, address="ray://127.0.0.1:10001").start()


def test_a_cluster_without_this_machine_is_refused() -> None:
    def held(*addresses: str) -> None:
        machines = tuple(Machine(id=address, address=address, alive=True) for address in addresses)
        check(View(address="192.0.2.1:6379", ray="2", python="3", machines=machines))

    with pytest.raises(InputError, match=r"not in the Ray cluster .*\(of 192.0.2.1\); let it join first"):
        held("192.0.2.1")
    held("192.0.2.1", "127.0.0.1")
