"""What another machine has of a simulation, as far as no Ray is needed: files that come once and go when unused."""

from pathlib import Path

import pytest

from offsite.client.site.policy import Policy
from offsite.deploy.simulation.elsewhere import Elsewhere
from offsite.deploy.simulation.orders import Setup
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import to_json
from offsite.protos.errors import MismatchError
from offsite.protos.spec import Choice


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """A machine that nothing has come to."""
    monkeypatch.setenv("OFFSITE_CACHE", str(tmp_path))
    policy = Policy(bases=("any",), data=("/",))
    common = {"data": "/data.jsonl", "sites": 2, "partition": Choice(name="iid"), "policy": policy}
    machine = Elsewhere(to_json(Setup(socket="", number=0, workers=1, spool="", seed=0, **common)), 1)
    machine.open()
    return machine


def send(machine: Elsewhere, data: bytes) -> str:
    """Send a file in pieces of two bytes."""
    digest = digest_bytes(data)
    for offset in range(0, len(data), 2):
        machine.write(digest, offset, data[offset : offset + 2])
    machine.keep(digest)
    return digest


def test_a_file_comes_once_and_goes_when_it_is_of_no_use_any_more(elsewhere: Elsewhere) -> None:
    first, second = send(elsewhere, b"adapter"), send(elsewhere, b"")
    assert elsewhere.lacks([first, second]) == []
    assert elsewhere.lacks([second]) == []
    assert elsewhere.lacks([first, second]) == [first]


def test_a_file_that_is_not_what_was_sent_is_refused_and_comes_anew(elsewhere: Elsewhere) -> None:
    digest = digest_bytes(b"adapter")
    elsewhere.write(digest, 0, b"another")
    with pytest.raises(MismatchError, match="other bytes"):
        elsewhere.keep(digest)
    assert elsewhere.lacks([digest]) == [digest]
    assert send(elsewhere, b"adapter") == digest and elsewhere.lacks([digest]) == []


def test_nothing_is_left_at_the_end(elsewhere: Elsewhere, tmp_path: Path) -> None:
    send(elsewhere, b"adapter")
    assert list((tmp_path / "simulations").iterdir())
    elsewhere.close()
    assert not list((tmp_path / "simulations").iterdir())
