"""A certificate that one gateway knows of is known to all, and one that is revoked is so everywhere."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from offsite.coordinator.service import lists
from offsite.coordinator.service.answer import Gate
from offsite.coordinator.service.lists import Lists
from offsite.coordinator.store.journal import Journal
from offsite.coordinator.store.opening import open_journal
from offsite.protos.errors import IdentityError
from offsite.protos.security.certificates import Peer
from offsite.protos.security.pki import Authority
from offsite.protos.security.revocation import Revocations


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = open_journal(f"sqlite://{tmp_path}/journal.db")
    yield made
    made.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create(tmp_path / "pki")
    made.issue("coordinator", "hub")
    return made


class Gateway:
    """What one gateway knows, from a kit that is a copy, beside the authority or not."""

    def __init__(self, authority: Authority, journal: Journal, home: Path, *, beside: bool = False) -> None:
        home.mkdir()
        self.kit = Path(shutil.copytree(authority.folder / "hub", home / "kit"))
        self.received = home / "crl.pem"
        others = (self.received, authority.folder / "crl.pem") if beside else (self.received,)
        self.revocations = Revocations(self.kit / "crl.pem", *others, seen=home / "crl-number")
        ca = (self.kit / "ca.crt").read_bytes()
        self.lists = Lists(self.revocations, journal, received=self.received, authority=ca)
        self.gate = Gate(self.revocations, look=self.lists.look)

    def exchange(self) -> None:
        asyncio.run(self.lists.exchange())

    def checks(self, peer: Peer) -> None:
        asyncio.run(self.gate._check(peer))


def issued(authority: Authority, name: str) -> Peer:
    return Peer.of(x509.load_pem_x509_certificate((authority.issue("site", name) / "tls.crt").read_bytes()))


def test_what_one_gateway_knows_all_know(
    authority: Authority, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "LOOK_S", 0.5)
    one = Gateway(authority, journal, tmp_path / "one", beside=True)
    two = Gateway(authority, journal, tmp_path / "two")
    berlin = issued(authority, "berlin")
    one.checks(berlin)
    with pytest.raises(IdentityError, match="not among those"):
        two.checks(berlin)
    one.exchange()
    two.checks(berlin)  # looked up when it is first needed
    authority.revoke("berlin")
    one.exchange()
    two.exchange()
    for gateway in (one, two):
        with pytest.raises(IdentityError, match="is revoked"):
            gateway.checks(berlin)
    known = two.revocations.newest().number
    again = Revocations(two.kit / "crl.pem", two.received, seen=tmp_path / "two" / "crl-number")  # after a restart
    assert again.newest().number == known


def test_a_list_that_is_on_its_way_is_waited_for(authority: Authority, journal: Journal, tmp_path: Path) -> None:
    one = Gateway(authority, journal, tmp_path / "one", beside=True)
    two = Gateway(authority, journal, tmp_path / "two")
    berlin = issued(authority, "berlin")

    async def both() -> None:
        checked = asyncio.create_task(two.gate._check(berlin))
        await asyncio.sleep(0.3)
        assert not checked.done()
        await one.lists.exchange()
        await checked

    asyncio.run(both())


def test_a_list_that_is_copied_into_one_kit_reaches_all(authority: Authority, journal: Journal, tmp_path: Path) -> None:
    gateways = [Gateway(authority, journal, tmp_path / name) for name in ("one", "two", "three")]
    berlin = issued(authority, "berlin")
    shutil.copy(authority.folder / "crl.pem", gateways[1].kit / "crl.pem")
    for gateway in (*gateways, *gateways):
        gateway.exchange()
    for gateway in gateways:
        gateway.checks(berlin)


def test_a_list_in_the_journal_that_the_authority_did_not_sign_counts_nowhere(
    authority: Authority, journal: Journal, tmp_path: Path
) -> None:
    gateway = Gateway(authority, journal, tmp_path / "one")
    foreign = Authority.create(tmp_path / "foreign").newest()
    journal.keep_list(2**40, foreign.pem)
    with pytest.raises(IdentityError, match="not a revocation list signed by the kit's"):
        gateway.exchange()
    assert not gateway.received.exists()
    gateway.received.write_bytes(foreign.pem)  # of the authority that this home had before
    assert gateway.revocations.newest().pem == (gateway.kit / "crl.pem").read_bytes()
