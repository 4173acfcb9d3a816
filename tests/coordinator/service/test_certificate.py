"""The coordinator's certificate is another one while it serves: renewed by itself, or by whoever writes the kit."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from offsite.client.channel import Channel
from offsite.coordinator.service.certificate import OwnCertificate
from offsite.protos.errors import IdentityError, RefusedError
from offsite.protos.security.certificates import hosts_of
from offsite.protos.security.identity import Identity
from offsite.protos.security.kit import next_key
from offsite.protos.security.pki import Authority
from offsite.protos.security.tls import server_credentials


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "pki")


@pytest.fixture
def kit(authority: Authority, tmp_path: Path) -> Path:
    """A coordinator's kit that is to be renewed, at a place of its own."""
    made = authority.issue("coordinator", "hub", days=30, _at=datetime.now(UTC) - timedelta(days=25))
    return Path(shutil.move(made, tmp_path / "kit"))


class Served:
    """A server that shows a certificate, and a site that calls it."""

    def __init__(self, own: OwnCertificate, site: Path) -> None:
        self._server, self._site = grpc.server(ThreadPoolExecutor(2)), Identity.load(site)
        self._channels: list[Channel] = []
        call = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Echo": call}),))
        credentials = server_credentials(own.identity, own.newest)
        self._address = f"localhost:{self._server.add_secure_port('localhost:0', credentials)}"
        self._server.start()

    def channel(self) -> Channel:
        self._channels.append(Channel(self._address, self._site, patience_s=5))
        return self._channels[-1]

    def certificate(self, channel: Channel) -> bytes:
        """Call, and return the certificate that the channel takes the coordinator for."""
        assert channel.call(channel.grpc.unary_unary("/test/Echo"), b"here") == b"here"
        return channel._certificate

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._server.stop(0)


@pytest.fixture
def serve(authority: Authority) -> Iterator[Any]:
    site, made = authority.issue("site", "ward"), []

    def serve(own: OwnCertificate) -> Served:
        made.append(Served(own, site))
        return made[-1]

    yield serve
    for one in made:
        one.close()


def test_it_is_renewed_beside_the_authority_while_calls_go_on(authority: Authority, kit: Path, serve: Any) -> None:
    own, before = OwnCertificate(kit, authority=authority.folder), Identity.load(kit)
    served = serve(own)
    site = served.channel()
    first = served.certificate(site)
    own.renew()
    renewed = Identity.load(kit, expect="coordinator")
    assert renewed.key != before.key and renewed.expires - before.expires > timedelta(days=24)
    assert served.certificate(site) == first, "a connection goes on as it began"
    certificate, old = (x509.load_pem_x509_certificate(one) for one in (served.certificate(served.channel()), first))
    assert certificate == x509.load_pem_x509_certificate(renewed.certificate) != old
    assert hosts_of(certificate) == hosts_of(old)
    assert authority.newest().issued >= {certificate.serial_number, old.serial_number}
    own.renew()
    assert Identity.load(kit).certificate == renewed.certificate, "there is time"


def test_a_kit_that_is_written_anew_is_shown_without_a_restart_unless_it_is_of_no_use(
    authority: Authority, kit: Path, serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = OwnCertificate(kit, authority=None)
    served = serve(own)
    first = served.certificate(served.channel())
    own.renew()
    own.renew()
    assert [record.getMessage().endswith("was not renewed; ask the model owner") for record in caplog.records] == [True]
    foreign = Authority.create(tmp_path / "foreign").issue("coordinator", "hub")
    for file in ("tls.key", "tls.crt", "ca.crt"):
        shutil.copy(foreign / file, kit / file)
    assert served.certificate(served.channel()) == served.certificate(served.channel()) == first
    assert [record.getMessage() for record in caplog.records[1:]] == [
        f"the certificate that was shown before is shown on: {kit}: now a kit of another authority; start the "
        "coordinator again"
    ]
    authority.revoke("hub")
    shutil.copytree(authority.issue("coordinator", "hub"), kit, dirs_exist_ok=True)
    assert served.certificate(served.channel()) != first


def test_who_holds_a_kit_of_a_coordinator_has_it_certified_anew_and_nobody_else(
    authority: Authority, kit: Path, tmp_path: Path
) -> None:
    held, copy = Identity.load(kit), Path(shutil.copytree(kit, tmp_path / "copy"))
    one, other = (next_key(folder).public_key() for folder in (kit, copy))
    again = [authority.recertify(held.certificate, key) for key in (one, one, other)]
    serials = [x509.load_pem_x509_certificate(pem).serial_number for pem in again]
    assert serials[0] == serials[1] != serials[2], "gateways with copies of one kit have one each"
    with pytest.raises(RefusedError, match="no such certificate for a coordinator"):
        authority.recertify(Identity.load(authority.issue("site", "ward")).certificate, one)
    authority.revoke("hub")
    with pytest.raises(IdentityError, match="'hub' is revoked; issue a kit"):
        authority.recertify(held.certificate, one)
