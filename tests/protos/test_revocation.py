"""Whom a list lets in: who was issued and not revoked, by the newest list, while it holds."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from offsite.protos.errors import IdentityError, ResourceError
from offsite.protos.security import revocation
from offsite.protos.security.certificates import Peer
from offsite.protos.security.pki import Authority
from offsite.protos.security.revocation import RevocationList, Revocations


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create(tmp_path / "pki")
    made.issue("coordinator", "hub")
    return made


@pytest.fixture
def kit(authority: Authority, tmp_path: Path) -> Path:
    """A copy of the coordinator's kit: what the authority writes reaches it only when it is copied."""
    return Path(shutil.copytree(authority.folder / "hub", tmp_path / "kit"))


def issued(authority: Authority, name: str) -> Peer:
    return Peer.of(x509.load_pem_x509_certificate((authority.issue("site", name) / "tls.crt").read_bytes()))


def copy(authority: Authority, kit: Path) -> None:
    shutil.copy(authority.folder / "crl.pem", kit / "crl.pem")


def test_who_is_not_listed_or_is_revoked_is_refused_from_the_next_look_on(authority: Authority, kit: Path) -> None:
    site = issued(authority, "berlin")
    revocations = Revocations(kit / "crl.pem")
    with pytest.raises(IdentityError, match=r"site 'berlin' is not among those that .*copy crl\.pem again"):
        revocations.check(site)
    copy(authority, kit)
    revocations.check(site)
    authority.revoke("berlin")
    copy(authority, kit)
    with pytest.raises(IdentityError, match="site 'berlin' is revoked"):
        revocations.check(site)


def test_an_older_list_is_never_taken_for_a_newer_one(
    authority: Authority, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = issued(authority, "berlin")
    copy(authority, kit)
    older = (kit / "crl.pem").read_bytes()
    authority.revoke("berlin")
    copy(authority, kit)
    revocations = Revocations(kit / "crl.pem", seen=tmp_path / "number")
    (kit / "crl.pem").write_bytes(older)
    with pytest.raises(IdentityError, match="is revoked"):  # by the newer one, which is remembered
        revocations.check(site)
    monkeypatch.setattr(revocation, "GRACE_S", 0.0)
    with pytest.raises(ResourceError, match="an older list than one that was used before"):
        revocations.check(site)
    with pytest.raises(IdentityError, match="an older list"):  # a restart does not forget
        Revocations(kit / "crl.pem", seen=tmp_path / "number")
    assert (tmp_path / "number").stat().st_mode & 0o777 == 0o600


def test_a_list_that_is_being_written_does_not_shut_anybody_out_at_once(
    authority: Authority, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = issued(authority, "berlin")
    copy(authority, kit)
    revocations = Revocations(kit / "crl.pem")
    good, foreign = (kit / "crl.pem").read_bytes(), Authority.create(tmp_path / "other").folder / "crl.pem"
    for bad in (good[:200], b"", b"scratched", foreign.read_bytes()):
        (kit / "crl.pem").write_bytes(bad)
        revocations.check(site)
        with pytest.raises(IdentityError, match="not a revocation list signed by the kit's ca.crt"):
            Revocations(kit / "crl.pem")
    (kit / "crl.pem").unlink()
    revocations.check(site)
    monkeypatch.setattr(revocation, "GRACE_S", 0.0)
    with pytest.raises(ResourceError, match=r"crl\.pem: cannot be read: .*nobody is let in until then"):
        revocations.check(site)  # not for what the caller did: it waits and asks again
    (kit / "crl.pem").write_bytes(good)
    revocations.check(site)


def test_past_its_end_a_list_lets_nobody_in_and_warns_before(
    authority: Authority, kit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = issued(authority, "berlin")
    authority.refresh(days=5)
    copy(authority, kit)
    revocations = Revocations(kit / "crl.pem")
    for _ in range(3):
        revocations.check(site)
    assert caplog.text.count("and then nobody is let in; renew it with `offsite pki refresh`") == 1
    ended = revocation.new_revocation_list(
        authority.issuer,
        number=2**40,
        issued=[site.serial],
        revoked=[],
        now=datetime.now(UTC) - timedelta(days=2),
        until=datetime.now(UTC) - timedelta(days=1),
    ).public_bytes(Encoding.PEM)
    (kit / "crl.pem").write_bytes(ended)
    with pytest.raises(ResourceError, match="nobody is let in; renew it"):
        revocations.check(site)


def test_a_list_without_the_certificates_issued_is_said_to_be_of_another_version(authority: Authority) -> None:
    issuer = authority.issuer
    plain = x509.CertificateRevocationListBuilder().issuer_name(issuer.certificate.subject)
    plain = plain.last_update(datetime.now(UTC)).next_update(datetime.now(UTC) + timedelta(1))
    signed = plain.sign(issuer.key, hashes.SHA256()).public_bytes(Encoding.PEM)
    with pytest.raises(IdentityError, match="does not name the certificates issued; renew it"):
        RevocationList.parse(signed, (authority.folder / "ca.crt").read_bytes(), where=Path("crl.pem"))


def test_a_client_refuses_what_a_newer_list_has_no_record_of_and_is_never_locked_out_by_an_old_one(
    authority: Authority, kit: Path
) -> None:
    now = datetime.now(UTC)

    def check(name: str, *, age: int) -> None:
        """Hold a coordinator against a list made some days ago, which ended a day later and does not name it."""
        ended = revocation.new_revocation_list(
            authority.issuer,
            number=1,
            issued=[],
            revoked=[],
            now=now - timedelta(days=age),
            until=now - timedelta(days=age - 1),
        ).public_bytes(Encoding.PEM)
        listed = RevocationList.parse(ended, (kit / "ca.crt").read_bytes(), where=Path("crl.pem"))
        certificate = x509.load_pem_x509_certificate((authority.folder / name / "tls.crt").read_bytes())
        listed.check_coordinator(certificate, where=Path("crl.pem"))

    authority.issue("coordinator", "elder", _at=now - timedelta(days=3))
    check("hub", age=2)
    with pytest.raises(IdentityError, match=r"'elder' is not among those that crl\.pem names, which is newer"):
        check("elder", age=2)
    check("elder", age=4)
