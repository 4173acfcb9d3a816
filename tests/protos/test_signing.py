import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from offsite.protos.errors import IdentityError, MismatchError
from offsite.protos.security.pki import Authority
from offsite.protos.security.signing import sign, verify

DOCUMENT = b'{"round":3,"run":"r1"}'


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Authority.create(tmp_path_factory.mktemp("owner")).folder


def test_a_coordinators_signature_holds_at_a_site(owner: Path) -> None:
    authority = Authority.open(owner)
    coordinator, site = authority.issue("coordinator", "hub"), authority.issue("site", "berlin")
    signature = sign(DOCUMENT, coordinator / "owner.key", purpose="task")
    verify(DOCUMENT, signature, site / "owner.pub", purpose="task")


def test_the_bytes_that_are_signed_stay_as_released(owner: Path) -> None:
    key = load_pem_public_key((owner / "owner.pub").read_bytes())
    assert isinstance(key, Ed25519PublicKey)
    key.verify(sign(DOCUMENT, owner / "owner.key", purpose="task"), b"offsite/v1\0task\0" + DOCUMENT)
    key.verify(sign(DOCUMENT, owner / "owner.key", purpose="bundle"), b"offsite/v1\0bundle\0" + DOCUMENT)


@pytest.mark.parametrize("place", range(0, len(DOCUMENT), 5))
def test_a_document_with_one_bit_changed_is_refused(owner: Path, place: int) -> None:
    signature = sign(DOCUMENT, owner / "owner.key", purpose="task")
    changed = bytearray(DOCUMENT)
    changed[place] ^= 1
    with pytest.raises(MismatchError, match="signature of this task is not the model owner's"):
        verify(bytes(changed), signature, owner / "owner.pub", purpose="task")


@pytest.mark.parametrize("signature", [b"", b"\0" * 64, b"\0" * 63, b"x" * 4096])
def test_what_is_no_signature_is_refused(owner: Path, signature: bytes) -> None:
    with pytest.raises(MismatchError):
        verify(DOCUMENT, signature, owner / "owner.pub", purpose="task")


def test_a_signature_for_one_purpose_is_worth_nothing_for_another(owner: Path) -> None:
    signature = sign(DOCUMENT, owner / "owner.key", purpose="task")
    with pytest.raises(MismatchError, match="this bundle"):
        verify(DOCUMENT, signature, owner / "owner.pub", purpose="bundle")


def test_another_owners_signature_is_refused(owner: Path, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other").folder
    with pytest.raises(MismatchError):
        verify(DOCUMENT, sign(DOCUMENT, other / "owner.key", purpose="task"), owner / "owner.pub", purpose="task")


def test_an_unknown_purpose_is_refused(owner: Path) -> None:
    with pytest.raises(ValueError, match="task, bundle"):
        sign(DOCUMENT, owner / "owner.key", purpose="tusk")  # type: ignore[arg-type]  # that is the test


def test_a_key_that_cannot_be_used_is_named(owner: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"owner\.key: cannot be read"):
        sign(DOCUMENT, tmp_path / "owner.key", purpose="task")
    with pytest.raises(IdentityError, match=r"owner\.pub: cannot be read"):
        verify(DOCUMENT, b"", tmp_path / "owner.pub", purpose="task")
    for source in ("ca.key", "index.json"):  # a key of another kind; no key at all
        shutil.copy(owner / source, tmp_path / "wrong")
        with pytest.raises(IdentityError, match="not an Ed25519 private key"):
            sign(DOCUMENT, tmp_path / "wrong", purpose="task")
        with pytest.raises(IdentityError, match="not an Ed25519 public key"):
            verify(DOCUMENT, b"", tmp_path / "wrong", purpose="task")
