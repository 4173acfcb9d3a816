"""Joining by a token, and renewal, with real processes and sockets: a key is made where it is used, and stays there."""

import base64
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from offsite.client import joining
from offsite.client.channel import Channel
from offsite.client.membership import Membership, Renewal
from offsite.client.session import connect
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc
from offsite.protos.errors import ConflictError, IdentityError, RefusedError
from offsite.protos.security import identity, tokens
from offsite.protos.security.handshake import check_coordinator
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.security.tokens import Token

from .conftest import Rogue


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, federations: Any) -> Iterator[Any]:
    """A federation whose coordinator certifies who joins."""
    with federations(tmp_path_factory.mktemp("joining")) as made:
        made.coordinate("--authority", str(made.folder / "pki"))
        yield made


def enrol(token: Token, kit: Path) -> Identity:
    return joining.enrol(token, kit, say=print)


def secrets_of(kit: Path) -> list[bytes]:
    """A private key, in each form in which it could be written."""
    key = load_pem_private_key((kit / "tls.key").read_bytes(), password=None)
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    number = key.private_numbers().private_value.to_bytes(32, "big")  # type: ignore[union-attr]
    pem = (kit / "tls.key").read_bytes().splitlines()[1]
    texts = [base64.b64encode(number)[:-3], base64.urlsafe_b64encode(number)[:-3], number.hex().encode()]
    return [number, der, pem, *texts]


def written(*folders: Path) -> Iterator[bytes]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield path.read_bytes()


def test_who_joined_by_tokens_does_a_run_and_their_keys_are_nowhere_else(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    call = Channel.call

    def listening(self: Channel, method: Any, request: Any, **more: Any) -> Any:
        sent.append(request.SerializeToString())
        return call(self, method, request, **more)

    monkeypatch.setattr(Channel, "call", listening)
    kits = {}
    for role, name in (("site", "clinic"), ("owner", "oscar")):
        token = tokens.read(str(federation.authority.token(role, name, address=federation.address)))
        kits[name] = federation.folder / "joined" / name
        kit = enrol(token, kits[name])
        assert (kit.role, kit.name) == (role, name)
        assert {path.name for path in kits[name].iterdir()} == {"tls.crt", "tls.key", "ca.crt", "owner.pub", "crl.pem"}
        assert enrol(token, kits[name]).certificate == kit.certificate  # it is there already
    assert list((federation.folder / "joined").glob(".*")) == []
    site = Rogue(federation, "clinic", kit=kits["clinic"])
    with connect(federation.address, identity=kits["oscar"]) as session:
        run = site.submit(session)
        task = site.pull()
        site.upload(task, site.broadcast(task))
        assert run.wait().state == "completed"
    site.channel.close()
    secrets = [secret for kit in kits.values() for secret in secrets_of(kit)]
    assert len(sent) > 5 and not [secret for data in sent for secret in secrets if secret in data]
    elsewhere = [federation.folder / "home", federation.folder / "pki"]
    assert not [secret for data in written(*elsewhere) for secret in secrets if secret in data]
    here = list(written(federation.folder / "joined"))
    assert any(secrets_of(kits["clinic"])[2] in data for data in here)


def test_a_token_lets_in_to_ask_for_one_certificate_and_nothing_else(federation: Any, tmp_path: Path) -> None:
    token = federation.authority.token("site", "narrow", address=federation.address)
    token.write(tmp_path / "kit")
    channel = Channel(federation.address, Identity.load(tmp_path / "kit", expect="joining"), patience_s=5)
    fleet: Any = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
    with pytest.raises(RefusedError, match="certificate for role joining; this call needs role site"):
        channel.call(fleet.Enrol, pb.EnrolRequest())
    with pytest.raises(RefusedError, match="certificate for role joining"):
        Membership(channel, tmp_path / "kit").renew(wait_s=0)
    channel.close()
    federation.authority.revoke("narrow")
    with pytest.raises(IdentityError, match="joining 'narrow' is revoked"):
        enrol(token, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_second_key_is_refused_and_the_owner_is_told(federation: Any, tmp_path: Path, wait: Any) -> None:
    token = federation.authority.token("site", "wanted", address=federation.address)
    enrol(token, tmp_path / "thief")
    with pytest.raises(RefusedError, match="token of site 'wanted' was used before, for another key"):
        enrol(token, tmp_path / "site")
    assert list(tmp_path.iterdir()) == [tmp_path / "thief"]
    log = federation.log("coordinator")
    wait(lambda: "token of site 'wanted' was used before" in log.read_text(), "the owner is told")
    assert federation.authority.index().tokens[-1].contested_at is not None


def test_who_is_killed_before_the_kit_is_written_asks_again_and_is_answered_alike(
    federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = federation.authority.token("site", "killed", address=federation.address)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(joining, "_write_kit", killed)
        enrol(token, tmp_path / "kit")
    assert not (tmp_path / "kit").exists()
    (entry,) = (one for one in federation.authority.entries() if one.name == "killed")
    kit = enrol(token, tmp_path / "kit")
    assert kit.name == "killed"
    assert [one.serial for one in federation.authority.entries() if one.name == "killed"] == [entry.serial]


def test_a_coordinator_of_another_authority_gets_not_even_a_request(federation: Any, tmp_path: Path) -> None:
    foreign = Authority.create(tmp_path / "foreign").token("site", "berlin", address=federation.address)
    with pytest.raises(IdentityError, match=r"was not issued by this kit's ca\.crt"):
        enrol(foreign, tmp_path / "kit")
    assert not (tmp_path / "kit").exists()
    with pytest.raises(ConflictError, match="is there already, and is no kit of site 'berlin'"):
        enrol(foreign, federation.owner)


def aged(federation: Any, name: str, *, role: Any = "site") -> Path:
    """A kit that is to be renewed, at a place of its own."""
    old = datetime.now(UTC).replace(microsecond=0) - timedelta(days=25)
    kit = federation.authority.issue(role, name, days=30, _at=old)
    return Path(shutil.move(kit, federation.folder / f"aged-{name}"))


def test_a_certificate_is_renewed_in_the_midst_of_an_upload_which_goes_on(federation: Any) -> None:
    site = Rogue(federation, "midst", kit=aged(federation, "midst"))
    said: list[str] = []
    renewal = Renewal(site.channel, before := Identity.load(site.kit), say=said.append)
    with federation.connect() as session:
        run = site.submit(session)
        task = site.pull()
        path = site.save(task, site.broadcast(task))
        data = path.read_bytes()

        def slowly() -> Iterator[pb.UploadPart]:
            yield pb.UploadPart(header=site.header(task, path))
            yield pb.UploadPart(offset=0, data=data[:100])
            renewal.look()
            yield pb.UploadPart(offset=100, data=data[100:])

        *_, last = site.channel.stream(site.fleet.Upload, slowly())
        assert last.digest and run.wait().state == "completed"
    after = Identity.load(site.kit)
    assert after.key != before.key and after.expires > before.expires + timedelta(days=20)
    assert not (site.kit / "next.key").exists() and not (site.kit / "next.crt").exists()
    assert len(said) == 1 and "renewed the certificate of midst" in said[0]
    certificates = [x509.load_pem_x509_certificate(kit.certificate) for kit in (before, after)]
    assert {one.serial_number for one in certificates} <= federation.authority.newest().issued
    site.channel.call(site.fleet.Enrol, pb.EnrolRequest())
    assert [key[-1] for key in site.channel._connections] == [before.certificate, after.certificate]
    site.channel.close()


@pytest.mark.slow
def test_agents_that_joined_and_that_renew_meanwhile_do_a_run(federation: Any, tmp_path: Path) -> None:
    token = federation.authority.token("site", "hospital", address=federation.address)
    (tmp_path / "token").write_text(str(token))
    federation.start("enrol", "site", "enrol", str(tmp_path / "token"), "--identity", str(tmp_path / "hospital"))
    assert federation.ended("enrol") == 0
    kit = aged(federation, "bank")
    before = Identity.load(kit)
    with federation.connect() as session:
        federation.join("hospital", identity=tmp_path / "hospital")
        federation.join("bank", identity=kit)
        run = session.submit(federation.spec(sites=("hospital", "bank"), rounds=2))
        assert "renewed the certificate of bank" in federation.expect("bank", "identity")["message"]
        assert run.wait().state == "completed"
    assert Identity.load(kit).key != before.key
    for name in ("hospital", "bank"):
        assert federation.events(name, "failed") == [] and len(federation.events(name, "uploaded")) == 2


def test_people_renew_when_they_connect_and_see_the_newest_list(federation: Any) -> None:
    kit = aged(federation, "rita", role="researcher")
    before = Identity.load(kit)
    with connect(federation.address, identity=kit) as session:
        assert session.runs() == []
    after = Identity.load(kit)
    assert after.expires > before.expires + timedelta(days=20)
    assert (kit / "crl.pem").read_bytes() == (federation.authority.folder / "crl.pem").read_bytes()
    federation.authority.revoke("rita")
    with connect(federation.address, identity=kit) as session, pytest.raises(IdentityError, match="is revoked"):
        session.runs()


def test_two_who_have_one_certificate_cannot_both_renew_it(federation: Any, tmp_path: Path) -> None:
    kit = aged(federation, "twice")
    copy = Path(shutil.copytree(kit, tmp_path / "copy"))
    said: list[str] = []
    for place in (kit, copy):
        channel = Channel(federation.address, Identity.load(place), patience_s=5)
        Renewal(channel, Identity.load(place), say=said.append).look()
        channel.close()
    assert "renewed the certificate of twice" in said[0]
    assert "certificate of site 'twice' was used before, for another key" in said[1]
    federation.authority.revoke("twice")
    renewed = Identity.load(kit)
    channel = Channel(federation.address, renewed, patience_s=5)
    with pytest.raises(IdentityError, match="is revoked; ask the model owner for a token, and join again"):
        Membership(channel, kit).renew(wait_s=0)
    channel.close()


def test_two_processes_with_one_kit_renew_it_together(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = aged(federation, "both")
    said: list[str] = []
    channels = [Channel(federation.address, Identity.load(kit), patience_s=5) for _ in range(2)]
    one, two = (Renewal(channel, Identity.load(kit), say=said.append) for channel in channels)
    renew = Membership.renew

    def slowly(self: Membership, *, wait_s: float) -> Any:
        reply = renew(self, wait_s=wait_s)
        monkeypatch.setattr(Membership, "renew", renew)
        one.look()  # meanwhile
        return reply

    monkeypatch.setattr(Membership, "renew", slowly)
    two.look()
    assert len(said) == 2 and all("renewed the certificate of both" in words for words in said)
    assert len([entry for entry in federation.authority.entries() if entry.name == "both"]) == 2
    assert not (kit / "next.key").exists()
    for channel in channels:
        fleet: Any = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
        assert channel.call(fleet.Enrol, pb.EnrolRequest()).site == "both"
        channel.close()


def test_many_join_at_once(federation: Any, tmp_path: Path) -> None:
    names = [f"many-{number}" for number in range(8)]
    made = [federation.authority.token("site", name, address=federation.address) for name in names]
    with ThreadPoolExecutor(8) as pool:
        kits = list(pool.map(lambda token: enrol(token, tmp_path / token.name), made))
    assert [kit.name for kit in kits] == names


def test_an_owner_signs_elsewhere_what_a_coordinator_without_an_authority_is_asked(
    federations: Any, wait: Any, tmp_path: Path
) -> None:
    with federations(tmp_path / "apart") as made:
        hub = Path(shutil.move(made.folder / "pki" / "coordinator", made.folder / "hub"))
        made.coordinate("--identity", str(hub))
        token = made.authority.token("site", "berlin", address=made.address)
        shutil.copy(made.authority.folder / "crl.pem", hub / "crl.pem")
        with ThreadPoolExecutor() as pool:
            joined = pool.submit(enrol, token, tmp_path / "kit")

            def signed() -> bool:
                command = [sys.executable, "-c", "from offsite.client.commands.identity import app; app()", "sign"]
                about = ["--coordinator", made.address, "--identity", str(made.owner)]
                done = subprocess.run([*command, str(made.authority.folder), *about], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                return "signed for site 'berlin'" in done.stdout

            wait(signed, "signing")
            kit = joined.result(timeout=60)
        channel = Channel(made.address, kit, patience_s=5)
        fleet: Any = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
        assert channel.call(fleet.Enrol, pb.EnrolRequest()).site == "berlin"  # its list came with what was signed
        channel.close()


@pytest.mark.slow
def test_any_gateway_answers_though_the_authority_is_beside_another_one(federations: Any, tmp_path: Path) -> None:
    stores = {"OFFSITE_JOURNAL": f"sqlite://{tmp_path}/journal.db", "OFFSITE_BLOBS": f"file://{tmp_path}/blobs"}
    with federations(tmp_path / "two", **stores) as made:
        hub = Path(shutil.copytree(made.folder / "pki" / "coordinator", made.folder / "hub"))
        north = made.coordinate("--authority", str(made.folder / "pki"), name="north", home="north")
        south = made.coordinate("--identity", str(hub), name="south", home="south")
        token = made.authority.token("site", "berlin", address=south)
        kit = enrol(token, tmp_path / "kit")
        for address in (south, north):
            channel = Channel(address, kit, patience_s=5)
            fleet: Any = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
            assert channel.call(fleet.Enrol, pb.EnrolRequest()).site == "berlin"
            channel.close()
        made.authority.revoke("berlin")
        channel = Channel(south, kit, patience_s=5)
        fleet = fleet_pb2_grpc.FleetStub(channel.grpc)  # type: ignore[no-untyped-call]
        with pytest.raises(IdentityError, match="is revoked"):  # it hears of it within seconds, in a long poll too
            while channel.call(fleet.PullTask, pb.PullTaskRequest(wait_s=5), timeout_s=20):
                continue
        channel.close()


def test_a_site_hears_of_a_revoked_coordinator_and_speaks_to_it_no_more(federation: Any) -> None:
    """The list comes from another coordinator of the same authority, as one that was stolen hides it."""
    stolen = Path(shutil.move(federation.authority.issue("coordinator", "stolen"), federation.folder / "stolen"))
    hub = Path(shutil.copytree(federation.authority.folder / "coordinator", federation.folder / "hub"))
    kit = federation.folder / "listening"
    enrol(federation.authority.token("site", "listening", address=federation.address), kit)
    federation.authority.revoke("stolen")
    certificate = (stolen / "tls.crt").read_bytes()
    own = Identity.load(kit)
    check_coordinator(certificate, own)  # by the list that it has
    channel = Channel(federation.address, own, patience_s=5)
    Renewal(channel, own, say=pytest.fail).look()
    channel.close()
    with pytest.raises(IdentityError, match="coordinator 'stolen' is revoked"):
        check_coordinator(certificate, own)
    check_coordinator((hub / "tls.crt").read_bytes(), own)


def test_a_clock_that_is_wrong_is_said_to_be_so_and_costs_no_token(
    federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = federation.authority.token("site", "late", address=federation.address)

    class Late(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) - timedelta(hours=1)

    with monkeypatch.context() as context:
        context.setattr(identity, "datetime", Late)
        with pytest.raises(IdentityError, match="joining 'late' is not valid before .* check this machine's clock"):
            enrol(token, tmp_path / "kit")
    assert enrol(token, tmp_path / "kit").name == "late"


@pytest.mark.parametrize("name", ["offsite-join-1.AAAA", "/nowhere/token"])
def test_what_is_no_token_is_a_sentence(offsite: Any, name: str, tmp_path: Path) -> None:
    done = offsite("site", "enrol", name, "--identity", str(tmp_path / "kit"))
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert "token" in done.stderr and "AAAA" not in done.stderr


def test_the_command_reads_a_token_from_a_file(federation: Any, offsite: Any, tmp_path: Path) -> None:
    token = federation.authority.token("auditor", "ann", address=federation.address)
    (tmp_path / "token").write_text(f"{token}\n")
    done = offsite("site", "enrol", str(tmp_path / "token"), "--identity", str(tmp_path / "kit"))
    assert done.returncode == 0, done.stderr
    assert "Wrote the kit of auditor 'ann'" in done.stdout
    assert Identity.load(tmp_path / "kit").name == "ann"
