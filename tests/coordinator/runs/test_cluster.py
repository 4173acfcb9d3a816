"""Ray at arm's length, as far as no Ray is needed: what is refused at once, and the token that is its own."""

import socket
from pathlib import Path

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.runs.cluster import OnRay, _token
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


def test_the_token_is_made_once_and_is_for_this_user_alone(tmp_path: Path) -> None:
    file = _token(tmp_path / "ray-token")
    token = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600 and len(token) == 64
    file.chmod(0o666)
    assert _token(file).read_text() == token and file.stat().st_mode & 0o777 == 0o600
