"""A token: who may join by it, what it gives away, and whom it lets in."""

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from offsite.protos.errors import ConflictError, IdentityError, InputError, OffsiteError
from offsite.protos.security import pki, tokens
from offsite.protos.security.certificates import Peer
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Answer, Authority
from offsite.protos.security.revocation import RevocationList
from offsite.protos.security.signing_requests import fingerprint, new_request, requested_key
from offsite.protos.security.tokens import Token

ADDRESS = "tune.acme.org:8443"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create(tmp_path / "pki")
    made.issue("coordinator", "hub")
    return made


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def serial(token: Token) -> int:
    return x509.load_pem_x509_certificate(token.files["tls.crt"]).serial_number


def ask(authority: Authority, caller: int, key: ec.EllipticCurvePrivateKey) -> Answer:
    (answer,) = authority.sign([(caller, new_request(key))])
    return answer


def granted(answer: Answer) -> x509.Certificate:
    assert not answer.refusal
    return x509.load_pem_x509_certificate(answer.certificate)


def listed(authority: Authority) -> RevocationList:
    return authority.newest()


def later(monkeypatch: pytest.MonkeyPatch, **span: float) -> None:
    """Set the authority's clock."""
    moment = datetime.now(UTC).replace(microsecond=0) + timedelta(**span)
    monkeypatch.setattr(pki, "now", lambda: moment)


def test_a_token_is_one_short_line_that_gives_back_a_kit_of_role_joining(authority: Authority, tmp_path: Path) -> None:
    token = authority.token("site", "berlin", address=ADDRESS)
    text = str(token)
    assert text.isascii() and text.isprintable() and " " not in text
    assert len(text) < 4000  # more than 4095 characters cannot be pasted at a terminal's prompt
    again = tokens.read(f"  {text[:900]}\r\n {text[900:]}\n")
    assert again == token and (again.address, again.role, again.name) == (ADDRESS, "site", "berlin")
    again.write(tmp_path / "kit")
    kit = Identity.load(tmp_path / "kit", expect="joining")
    assert (kit.name, kit.expires) == ("berlin", token.expires)
    with pytest.raises(IdentityError, match="one of role coordinator, site, owner, researcher or auditor is needed"):
        Identity.load(tmp_path / "kit")  # it is no kit
    assert timedelta(hours=23) < token.expires - datetime.now(UTC) < timedelta(hours=25)
    assert "PRIVATE" not in repr(token) and b"PRIVATE" not in (authority.folder / "index.json").read_bytes()


def test_a_tokens_list_names_coordinators_and_lets_nobody_else_in(authority: Authority) -> None:
    authority.issue("site", "paris")
    token = authority.token("site", "berlin", address=ADDRESS)
    known = RevocationList.parse(token.files["crl.pem"], token.files["ca.crt"], where=Path("token"))
    hub = x509.load_pem_x509_certificate((authority.folder / "hub" / "tls.crt").read_bytes())
    assert known.issued == {hub.serial_number}


@pytest.mark.parametrize("role", ["site", "owner", "researcher", "auditor"])
def test_a_key_is_certified_for_what_the_token_says_and_nothing_that_is_asked(authority: Authority, role: str) -> None:
    token = authority.token(role, "ada", address=ADDRESS, days=7)  # type: ignore[arg-type]
    key = new_key()
    names = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hub")])
    wanted = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("offsite://owner/hub")])
    request = x509.CertificateSigningRequestBuilder().subject_name(names).add_extension(wanted, critical=False)
    greedy = request.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    certificate = granted(authority.sign([(serial(token), greedy)])[0])
    peer = Peer.of(certificate)
    assert (peer.role, peer.name) == (role, "ada")
    assert certificate.public_key() == key.public_key()
    assert timedelta(days=6) < peer.expires - datetime.now(UTC) <= timedelta(days=7)
    assert peer.serial in listed(authority).issued


def test_a_token_holds_for_one_key_and_who_asks_again_is_answered_alike(authority: Authority) -> None:
    token, key = authority.token("site", "berlin", address=ADDRESS), new_key()
    first = granted(ask(authority, serial(token), key))
    before = authority.index()
    again = granted(ask(Authority.open(authority.folder), serial(token), key))
    assert (again.serial_number, again.not_valid_after_utc) == (first.serial_number, first.not_valid_after_utc)
    assert authority.index() == before
    thief = ask(authority, serial(token), new_key())
    assert not thief.certificate
    assert "token of site 'berlin' was used before, for another key" in thief.refusal
    assert "revokes 'berlin'" in thief.refusal
    (invitation,) = authority.index().tokens
    assert invitation.status == "used" and invitation.contested_at is not None
    assert [entry.name for entry in authority.entries()] == ["hub", "berlin"]


def test_a_token_ends_by_time_by_another_one_and_by_revocation(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = authority.token("site", "berlin", address=ADDRESS)
    second = authority.token("researcher", "berlin", address=ADDRESS, hours=2)
    assert [one.status for one in authority.index().tokens] == ["revoked", "open"]
    assert "revoked" in ask(authority, serial(first), new_key()).refusal
    assert serial(first) in listed(authority).revoked
    with monkeypatch.context() as context:
        later(context, hours=3)
        assert "expired" in ask(authority, serial(second), new_key()).refusal
    authority.revoke("berlin")
    assert "revoked" in ask(authority, serial(second), new_key()).refusal
    assert {serial(first), serial(second)} <= listed(authority).revoked


def test_a_revoked_party_gets_nothing_by_what_it_had(authority: Authority) -> None:
    token, key = authority.token("site", "berlin", address=ADDRESS), new_key()
    certificate = granted(ask(authority, serial(token), key))
    authority.revoke("berlin")
    assert {serial(token), certificate.serial_number} <= listed(authority).revoked
    assert "revoked" in ask(authority, serial(token), key).refusal
    assert "revoked" in ask(authority, certificate.serial_number, new_key()).refusal
    granted(ask(authority, serial(authority.token("site", "berlin", address=ADDRESS)), new_key()))


def test_a_certificate_is_renewed_for_one_new_key_alike_but_for_its_dates(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = authority.token("site", "berlin", address=ADDRESS, days=30)
    first, key = granted(ask(authority, serial(token), new_key())), new_key()
    later(monkeypatch, days=20)
    second = granted(ask(authority, first.serial_number, key))
    assert Peer.of(second).name == "berlin" and second.public_key() == key.public_key()
    assert second.not_valid_after_utc - first.not_valid_after_utc == timedelta(days=20)
    assert {first.serial_number, second.serial_number} <= listed(authority).issued  # a task under way goes on
    assert granted(ask(authority, first.serial_number, key)).serial_number == second.serial_number
    assert "certificate of site 'berlin' was used before" in ask(authority, first.serial_number, new_key()).refusal
    later(monkeypatch, days=51)
    assert "expired" in ask(authority, second.serial_number, new_key()).refusal


def test_nobody_becomes_a_coordinator_and_strangers_get_nothing(authority: Authority) -> None:
    with pytest.raises(InputError, match="a coordinator does not join by a token"):
        authority.token("coordinator", "hub2", address=ADDRESS)
    hub = x509.load_pem_x509_certificate((authority.folder / "hub" / "tls.crt").read_bytes()).serial_number
    for caller in (hub, 12345):
        assert "no token or certificate" in ask(authority, caller, new_key()).refusal


def test_a_token_for_a_name_that_is_taken_is_refused_when_made_and_when_used(authority: Authority) -> None:
    token = authority.token("site", "berlin", address=ADDRESS)
    authority.issue("site", "Berlin")
    with pytest.raises(ConflictError, match="revoke it first"):
        authority.token("site", "berlin", address=ADDRESS)
    assert "revoke it first" in ask(authority, serial(token), new_key()).refusal
    authority.revoke("Berlin")
    granted(ask(authority, serial(token), new_key()))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"hours": 0}, "hours must be in 1"),
        ({"days": 0}, "days must be in 1"),
        ({"address": "nowhere"}, "HOST:PORT"),
        ({"name": "../up"}, "is not a name"),
        ({"name": "ca.key"}, "own files"),
    ],
)
def test_a_token_that_makes_no_sense_is_not_made(authority: Authority, more: dict[str, object], words: str) -> None:
    fields: dict[str, object] = {"name": "berlin", "address": ADDRESS, **more}
    with pytest.raises(InputError, match=words):
        authority.token("site", str(fields.pop("name")), **fields)  # type: ignore[arg-type]
    assert authority.index().tokens == ()


def test_only_a_request_for_a_p256_key_that_signed_it_is_taken(authority: Authority) -> None:
    token, key = authority.token("site", "berlin", address=ADDRESS), new_key()
    assert fingerprint(requested_key(new_request(key))) == fingerprint(key.public_key())
    unsigned = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))

    def request(other: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
        how = None if isinstance(other, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        return unsigned.sign(other, how).public_bytes(Encoding.DER)

    good = new_request(key)
    point = key.public_key().public_numbers().x.to_bytes(32, "big")
    other = new_key().public_key().public_numbers()
    forged = good.replace(point, other.x.to_bytes(32, "big"))
    mine = key.public_key().public_numbers().y.to_bytes(32, "big")
    version = good.replace(bytes([2, 1, 0]), bytes([2, 1, 9]), 1)
    wrong = {
        "another kind": [
            request(ec.generate_private_key(ec.SECP384R1())),
            request(rsa.generate_private_key(public_exponent=65537, key_size=2048)),
            request(ed25519.Ed25519PrivateKey.generate()),
        ],
        "not signed with the key": [forged.replace(mine, other.y.to_bytes(32, "big"))],
        "not a signing request": [b"", b"scratched", good[:-1], good * 20, forged, version],
    }
    for words, requests in wrong.items():
        for answer in authority.sign([(serial(token), one) for one in requests]):
            assert not answer.certificate and words in answer.refusal
    assert authority.index().tokens[0].status == "open"


def test_what_is_damaged_is_refused_without_a_word_of_it(authority: Authority, tmp_path: Path) -> None:
    text = str(authority.token("site", "berlin", address=ADDRESS))
    other = str(Authority.create(tmp_path / "other").token("site", "berlin", address=ADDRESS))
    secret = text[len(tokens.PREFIX) : len(tokens.PREFIX) + 40]
    wrong = ["", "offsite", text[:-7], text[:500], text + "AAAA", tokens.PREFIX, tokens.PREFIX + "x" * 20_000]
    wrong += [text[:400] + other[400:], text.upper(), text.replace("j", "~")]
    content = json.loads(base64.urlsafe_b64decode(text.removeprefix(tokens.PREFIX) + "=="))
    unknown = base64.urlsafe_b64decode(content["owner"] + "==").replace(bytes([43, 101, 112]), bytes([43, 101, 0]))
    content["owner"] = base64.urlsafe_b64encode(unknown).decode().rstrip("=")  # a key of a kind that nobody knows
    wrong.append(tokens.PREFIX + base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("="))
    for one in wrong:
        with pytest.raises(InputError) as caught:
            tokens.read(one)
        assert secret not in str(caught.value) and len(str(caught.value)) < 200


def test_a_token_that_ended_says_when_and_what_the_clock_says(authority: Authority) -> None:
    token = authority.token("site", "berlin", address=ADDRESS)
    token.check_date()
    old = Token(token.address, token.role, token.name, datetime(2026, 1, 2, 3, 4, tzinfo=UTC), token.files)
    with pytest.raises(
        IdentityError, match=r"token of site 'berlin' ended at 2026-01-02 03:04 UTC, and it is .* clock"
    ):
        old.check_date()


def test_who_is_long_gone_is_on_no_list(authority: Authority) -> None:
    old = datetime.now(UTC) - timedelta(days=400)
    authority.issue("site", "elder", _at=old)
    assert len(listed(authority).issued) == 1  # the hub
    assert [entry.name for entry in authority.entries()] == ["hub", "elder"]


def test_a_kit_of_the_folder_is_renewed_while_the_one_before_holds(authority: Authority) -> None:
    kit = authority.folder / "hub"
    authority.revoke("hub")
    authority.issue("coordinator", "hub", hosts=["tune.acme.org", "10.0.0.7"])
    old = Identity.load(kit)
    assert authority.renew("hub", days=90) == kit
    new = Identity.load(kit, expect="coordinator")
    assert new.key != old.key and new.certificate != old.certificate
    names = x509.load_pem_x509_certificate(new.certificate).extensions
    hosts = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert hosts.get_values_for_type(x509.DNSName) == ["tune.acme.org"]
    assert [str(one) for one in hosts.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    both = {Peer.of(x509.load_pem_x509_certificate(one.certificate)).serial for one in (old, new)}
    assert both <= listed(authority).issued and not both & listed(authority).revoked
    authority.revoke("hub")
    assert both <= listed(authority).revoked
    token = authority.token("site", "berlin", address=ADDRESS)
    granted(ask(authority, serial(token), new_key()))
    with pytest.raises(OffsiteError, match="no kit of 'berlin' in it .* renews by itself"):
        authority.renew("berlin")
