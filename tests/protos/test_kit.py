"""A kit's key and certificate are replaced as one, whoever looks meanwhile and whenever a kill comes."""

import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from offsite.protos.errors import IdentityError
from offsite.protos.security import kit as files
from offsite.protos.security.identity import Identity
from offsite.protos.security.kit import next_key, pair, replace_pair
from offsite.protos.security.pki import Authority
from offsite.protos.security.signing_requests import new_request


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "pki")


def renewed(authority: Authority, kit: Path) -> bytes:
    """The certificate that a kit's next key is given."""
    serial = x509.load_pem_x509_certificate(Identity.load(kit).certificate).serial_number
    (answer,) = authority.sign([(serial, new_request(next_key(kit)))])
    assert not answer.refusal
    return answer.certificate


def test_a_kit_is_whole_after_a_kill_at_any_moment_of_its_renewal(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = authority.issue("site", "berlin")
    old, certificate = Identity.load(kit), renewed(authority, kit)
    key = (kit / "next.key").read_bytes()
    assert (kit / "next.key").stat().st_mode & 0o777 == 0o600
    replace, seen = Path.replace, set()
    for moment in range(1, 5):
        copy, left = Path(shutil.copytree(kit, tmp_path / f"killed-{moment}")), [moment]

        def killed(path: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as context:
            context.setattr(Path, "replace", killed)
            try:
                replace_pair(copy, certificate)
            except KeyboardInterrupt:
                seen.add(moment)
        found = Identity.load(copy, expect="site")
        assert found.certificate in (old.certificate, certificate)
        with pair(copy) as paths:
            assert tuple(path.read_bytes() for path in paths) == (found.certificate, found.key)
        if found.certificate == old.certificate:  # it asks again for the same key, and is answered alike
            assert next_key(copy).private_numbers().private_value
            assert (copy / "next.key").read_bytes() == key
            replace_pair(copy, certificate)
        assert Identity.load(copy).certificate == certificate and Identity.load(copy).key == key
        next_key(copy)  # of the renewal after this one: it must not be taken for the key of what holds
        assert Identity.load(copy).key == key
        assert not (copy / "next.crt").exists()
    assert seen == {1, 2, 3}


def test_who_reads_a_kit_while_it_is_renewed_sees_one_or_the_other(authority: Authority) -> None:
    kit = authority.issue("site", "berlin")
    done, faults = threading.Event(), []

    def look() -> None:
        while not done.is_set():
            try:
                Identity.load(kit)
            except IdentityError as error:
                faults.append(error)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(20):
        replace_pair(kit, renewed(authority, kit))
    done.set()
    for reader in readers:
        reader.join()
    assert faults == []


def test_a_next_key_that_is_none_is_named(authority: Authority) -> None:
    kit = authority.issue("site", "berlin")
    files.write(kit / "next.key", b"scratched", secret=True)
    with pytest.raises(IdentityError, match=r"next\.key: not a private key of ours; remove"):
        next_key(kit)


def test_a_kit_is_to_be_renewed_with_a_third_of_its_life_left(authority: Authority) -> None:
    kit = Identity.load(authority.issue("site", "berlin", days=30))
    assert abs(kit.expires - kit.renewal - timedelta(days=10)) < timedelta(minutes=10)
    assert kit.renewal > datetime.now(UTC) + timedelta(days=19)
