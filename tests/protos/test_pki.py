import json
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from offsite.protos.errors import ConflictError, IdentityError, InputError, NotFoundError, OffsiteError
from offsite.protos.security.certificates import PEOPLE, subject
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority

NOW = datetime.now(UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "pki", name="acme")


def certificate(kit: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((kit / "tls.crt").read_bytes())


def revoked_serials(path: Path, authority: Authority) -> set[int]:
    crl = x509.load_pem_x509_crl(path.read_bytes())
    key = x509.load_pem_x509_certificate((authority.folder / "ca.crt").read_bytes()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(key)
    return {entry.serial_number for entry in crl}


def extension(certificate: x509.Certificate, kind: Any) -> Any:
    return certificate.extensions.get_extension_for_class(kind).value


def refused(kind: type[OffsiteError], *fragments: str) -> Any:
    """Expect one error of exactly this class whose message is a single line holding all the fragments."""

    def one_sentence(error: OffsiteError) -> bool:
        text = str(error)
        return type(error) is kind and "\n" not in text and all(fragment in text for fragment in fragments)

    return pytest.raises(OffsiteError, check=one_sentence)


def test_secret_files_are_readable_by_their_owner_alone(authority: Authority) -> None:
    kit = authority.issue("coordinator", "hub")
    secret = ["ca.key", "owner.key", "hub/tls.key", "hub/owner.key"]
    assert [stat.S_IMODE((authority.folder / file).stat().st_mode) for file in secret] == [0o600] * 4
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (authority.folder, kit)] == [0o700] * 2


def test_only_the_coordinators_kit_holds_the_owners_key(authority: Authority) -> None:
    common = {"tls.crt", "tls.key", "ca.crt", "owner.pub", "crl.pem"}
    files = {role: {path.name for path in authority.issue(role, f"a-{role}").iterdir()} for role in ("site", *PEOPLE)}
    assert files == dict.fromkeys(("site", *PEOPLE), common)
    assert {path.name for path in authority.issue("coordinator", "hub").iterdir()} == common | {"owner.key"}


@pytest.mark.parametrize("mode", [0o666, 0o640, 0o604])
def test_a_key_that_others_may_use_is_refused(authority: Authority, mode: int) -> None:
    kit = authority.issue("coordinator", "hub")
    for file in ("tls.key", "owner.key"):
        (kit / file).chmod(mode)
        with refused(IdentityError, f"{kit / file}: others", f"mode {mode:o}", f"chmod 600 {kit / file}"):
            Identity.load(kit)
        (kit / file).chmod(0o600)
    Identity.load(kit)


def test_an_authority_is_never_overwritten(authority: Authority) -> None:
    before = {path.name: path.read_bytes() for path in authority.folder.iterdir()}
    with refused(ConflictError, str(authority.folder), "never overwritten"):
        Authority.create(authority.folder)
    assert {path.name: path.read_bytes() for path in authority.folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refused(InputError, "file", "cannot be written"):
        Authority.create(tmp_path / "file" / "pki")


def test_a_certificate_says_whose_it_is_and_what_for(authority: Authority) -> None:
    site = certificate(authority.issue("site", "berlin"))
    assert subject(site) == ("site", "berlin")
    assert site.subject.rfc4514_string() == "CN=berlin"
    assert list(extension(site, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert extension(site, x509.BasicConstraints).ca is False
    names = extension(site, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["offsite://site/berlin"]
    assert names.get_values_for_type(x509.DNSName) == []
    assert timedelta(minutes=4) < datetime.now(UTC) - site.not_valid_before_utc < timedelta(minutes=6)


def test_a_coordinators_certificate_names_its_hosts(authority: Authority) -> None:
    def hosts(kit: Path) -> list[str]:
        names = extension(certificate(kit), x509.SubjectAlternativeName)
        addresses = names.get_values_for_type(x509.IPAddress)
        return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]

    assert hosts(authority.issue("coordinator", "one")) == ["localhost", "127.0.0.1", "::1"]
    assert hosts(authority.issue("coordinator", "two", hosts=["tune.acme.org", "10.0.0.7"])) == [
        "tune.acme.org",
        "10.0.0.7",
    ]


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "pki", days=10)
    ends = x509.load_pem_x509_certificate((tmp_path / "pki" / "ca.crt").read_bytes()).not_valid_after_utc
    assert certificate(authority.issue("site", "berlin", days=365)).not_valid_after_utc == ends
    with refused(IdentityError, "ca.crt", "expired on"):
        authority.issue("site", "paris", _at=NOW + timedelta(days=11))


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a\n", "-x", "a" * 65, "caf\u00e9"])
def test_a_name_that_could_leave_the_folder_is_refused(authority: Authority, name: str) -> None:
    with refused(InputError, repr(name)):
        authority.issue("site", name)
    assert authority.entries() == ()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"role": "site", "name": "ca.key"}, "own files"),
        ({"role": "boss", "name": "x"}, "coordinator, site, owner, researcher, auditor"),
        ({"role": "site", "name": "x", "days": 0}, "1..36500"),
        ({"role": "site", "name": "x", "hosts": ["localhost"]}, "never dialled"),
        ({"role": "coordinator", "name": "x", "hosts": ["https://acme.org"]}, "without port or scheme"),
        ({"role": "coordinator", "name": "x", "hosts": ["acme.org:8443"]}, "without port or scheme"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(authority: Authority, arguments: Any, fragment: str) -> None:
    with refused(InputError, fragment):
        authority.issue(**arguments)
    assert authority.entries() == ()


def test_a_name_has_one_valid_certificate_at_a_time(authority: Authority) -> None:
    first = certificate(authority.issue("site", "berlin"))
    for role, name in (("site", "berlin"), ("researcher", "berlin"), ("site", "Berlin")):
        with refused(ConflictError, "'berlin'", "pki revoke"):
            authority.issue(role, name)  # type: ignore[arg-type]  # the table's roles are plain strings
    authority.revoke("berlin")
    second = certificate(authority.issue("researcher", "berlin"))
    assert [entry.serial for entry in authority.entries()] == [f"{c.serial_number:x}" for c in (first, second)]


def test_an_expired_name_can_be_issued_again(authority: Authority) -> None:
    authority.issue("site", "berlin", _at=NOW - timedelta(days=400))
    authority.issue("site", "berlin")
    assert [entry.status for entry in authority.entries()] == ["expired", "valid"]


def test_a_new_kit_leaves_nothing_of_the_old_one(authority: Authority) -> None:
    authority.issue("coordinator", "hub")
    authority.revoke("hub")
    assert not (authority.issue("site", "hub") / "owner.key").exists()


def test_a_folder_that_is_no_kit_is_left_alone(authority: Authority) -> None:
    (authority.folder / "notes").mkdir()
    (authority.folder / "notes" / "diary.txt").write_text("mine")
    with refused(ConflictError, "notes", "not a kit"):
        authority.issue("site", "notes")
    assert (authority.folder / "notes" / "diary.txt").read_text() == "mine"
    assert authority.entries() == ()


def test_what_was_issued_and_revoked_reaches_every_kit_in_the_folder(authority: Authority) -> None:
    kits = [authority.issue("coordinator", "hub"), authority.issue("site", "berlin"), authority.issue("site", "paris")]
    berlin, paris = (certificate(kit).serial_number for kit in kits[1:])
    assert revoked_serials(authority.folder / "crl.pem", authority) == set()
    written = authority.revoke("berlin")
    assert set(written) == {folder / "crl.pem" for folder in (authority.folder, *kits)}
    assert all(revoked_serials(path, authority) == {berlin} for path in written)
    authority.revoke("paris")
    assert revoked_serials(kits[0] / "crl.pem", authority) == {berlin, paris}
    late = authority.issue("coordinator", "late")
    assert revoked_serials(late / "crl.pem", authority) == {berlin, paris}
    authority.refresh(days=3)
    crl = x509.load_pem_x509_crl((late / "crl.pem").read_bytes())
    assert crl.next_update_utc is not None and timedelta(2) < crl.next_update_utc - NOW < timedelta(4)


def test_revoking_what_does_not_hold_is_refused(authority: Authority) -> None:
    authority.issue("site", "berlin")
    with refused(NotFoundError, "'paris'", "valid: berlin"):
        authority.revoke("paris")
    authority.revoke("berlin")
    with refused(NotFoundError, "'berlin'", "valid: none"):
        authority.revoke("berlin")


def test_an_authority_opened_again_carries_on(authority: Authority) -> None:
    authority.issue("site", "berlin")
    again = Authority.open(authority.folder)
    again.revoke("berlin")
    Identity.load(again.issue("site", "paris"), expect="site")
    assert [(entry.name, entry.status) for entry in authority.entries()] == [("berlin", "revoked"), ("paris", "valid")]


def test_kits_issued_at_the_same_time_are_all_on_record(authority: Authority) -> None:
    names = [f"site-{i}" for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: Authority.open(authority.folder).issue("site", name), names))
    assert sorted(entry.name for entry in authority.entries()) == sorted(names)


def test_a_folder_without_an_authority_is_named(tmp_path: Path, authority: Authority) -> None:
    with refused(NotFoundError, str(tmp_path / "none"), "offsite pki init"):
        Authority.open(tmp_path / "none")
    other = Authority.create(tmp_path / "other")
    shutil.copy(other.folder / "ca.key", authority.folder / "ca.key")
    with refused(IdentityError, "ca.key does not belong to ca.crt"):
        Authority.open(authority.folder)
    (authority.folder / "ca.key").write_text("scratched")
    with refused(IdentityError, "damaged"):
        Authority.open(authority.folder)


def test_a_damaged_index_is_named(authority: Authority) -> None:
    (authority.folder / "index.json").write_text(json.dumps({"certificates": [{"serial": "1"}]}))
    with refused(InputError, "index.json", "certificates.0."):
        authority.issue("site", "berlin")


def test_a_good_kit_says_who_it_is(authority: Authority) -> None:
    kit = authority.issue("site", "berlin", days=30)
    identity = Identity.load(kit, expect="site")
    assert (identity.role, identity.name, identity.folder) == ("site", "berlin", kit)
    assert identity.expires == certificate(kit).not_valid_after_utc
    assert identity.warning is None
    assert b"PRIVATE" in identity.key
    assert "PRIVATE" not in repr(identity)


def test_a_kit_that_ends_soon_warns(authority: Authority) -> None:
    for role in ("coordinator", "site"):
        started = NOW - timedelta(days=8 if role == "site" else 0)  # a site renews its certificate by itself, till then
        kit = authority.issue(role, f"a-{role}", days=10, _at=started)  # type: ignore[arg-type]
        warning = Identity.load(kit).warning
        assert warning is not None
        assert f"{role} 'a-{role}' expires on" in warning
        assert f"in {1 if role == 'site' else 9} days, and was not renewed" in warning
    assert Identity.load(authority.issue("site", "paris", days=10)).warning is None


def test_a_kit_that_is_not_whole_names_the_missing_file(authority: Authority, tmp_path: Path) -> None:
    for role in ("site", "coordinator"):
        kit = authority.issue(role, f"a-{role}")
        for file in sorted(path.name for path in kit.iterdir()):
            copy = tmp_path / f"{role}-without-{file}"
            shutil.copytree(kit, copy)
            (copy / file).unlink()
            with refused(IdentityError, str(copy / file), "no such file"):
                Identity.load(copy)
    with refused(IdentityError, "no such file"):
        Identity.load(tmp_path / "nowhere")


def test_a_kit_put_together_from_several_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", name="acme")  # the same name, another key
    stranger = other.issue("site", "paris")
    for file, fragment in (("tls.key", "does not belong to tls.crt"), ("ca.crt", "not issued by this kit's ca.crt")):
        kit = authority.issue("site", f"with-other-{file}")
        shutil.copy(stranger / file, kit / file)
        with refused(IdentityError, str(kit), fragment):
            Identity.load(kit)


@pytest.mark.parametrize("file", ["tls.crt", "tls.key", "ca.crt"])
def test_a_damaged_kit_names_the_file(authority: Authority, file: str) -> None:
    kit = authority.issue("site", "berlin")
    (kit / file).write_text("scratched")
    with refused(IdentityError, str(kit / file), "PEM form"):
        Identity.load(kit)


def test_a_kit_outside_its_dates_is_refused_with_the_date(authority: Authority) -> None:
    past, future = NOW - timedelta(days=400), NOW + timedelta(days=30)
    with refused(IdentityError, "site 'old' expired on", f"{past + timedelta(days=365):%Y-%m-%d}", "pki issue"):
        Identity.load(authority.issue("site", "old", _at=past))
    with refused(IdentityError, "site 'early' is not valid before", f"{future:%Y-%m-}", "clock"):
        Identity.load(authority.issue("site", "early", _at=future))


def test_a_kit_of_another_role_is_refused(authority: Authority) -> None:
    kit = authority.issue("researcher", "ada")
    with refused(IdentityError, "researcher 'ada'", "one of role site is needed"):
        Identity.load(kit, expect="site")
    assert Identity.load(kit, expect=PEOPLE).name == "ada"
    with refused(IdentityError, "role owner or auditor is needed"):
        Identity.load(kit, expect=("owner", "auditor"))


def test_the_authoritys_own_certificate_is_nobodys(authority: Authority) -> None:
    kit = authority.issue("site", "berlin")
    shutil.copy(authority.folder / "ca.crt", kit / "tls.crt")
    shutil.copy(authority.folder / "ca.key", kit / "tls.key")
    with refused(IdentityError, "tls.crt", "names no role"):
        Identity.load(kit)
