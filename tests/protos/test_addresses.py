"""Addresses: what can be dialled, what can be listened on, and what to write instead of all else."""

import pytest

from offsite.protos.addresses import Address, parse, parse_all
from offsite.protos.errors import InputError


@pytest.mark.parametrize("text", ["localhost:8443", "127.0.0.1:1", "[::1]:8443", "tuning.example.org:65535", "a_b-c:9"])
def test_an_address_is_read_and_written_alike(text: str) -> None:
    assert str(parse(text)) == text


def test_several_addresses_have_commas_between() -> None:
    assert parse_all("a:1, [::1]:2,b:3") == (Address("a", 1), Address("::1", 2), Address("b", 3))
    with pytest.raises(InputError, match="'' is not an address"):
        parse_all("a:1,")


def test_port_0_is_only_for_listening() -> None:
    assert parse("0.0.0.0:0", listening=True) == Address("0.0.0.0", 0)
    with pytest.raises(InputError, match="a port from 1 to 65535"):
        parse("127.0.0.1:0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere", "no port.; expected HOST:PORT"),
        (":8443", "no host"),
        ("", "no port"),
        ("host:", "a port from 1 to 65535"),
        ("host:70000", "a port from 1 to 65535"),
        ("host:-1", "a port from 1 to 65535"),
        ("host:٣", "a port from 1 to 65535"),
        ("host:" + "9" * 5000, "a port from 1 to 65535"),
        ("https://tuning.example.org:443/x", "is a URL; write HOST:PORT, here tuning.example.org:443"),
        ("https://tuning.example.org", "is a URL; write HOST:PORT, here tuning.example.org:8443"),
        ("grpc://[::1", "is a URL; write HOST:PORT"),
        ("::1", "is an IPv6 address without a port; write it in brackets, .::1.:8443"),
        ("fe80::1:8443", "IPv6 address without a port"),
        ("[::1]", "no host name"),
        ("[localhost]:8443", "no host name or IP address"),
        ("a b:1", "no host name or IP address"),
        ("alice@host:1", "no host name or IP address"),
        ("host/x:1", "no host name or IP address"),
        ("\x1b[31mhost:1", "no host name or IP address"),
        ("x" * 5000 + ":1", "no host name or IP address"),
    ],
)
def test_what_is_no_address_is_answered_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        parse(text)
    assert len(str(refused.value)) < 500 and str(refused.value).isprintable()


def test_a_proxy_stands_between_unless_it_is_this_machine_or_spared() -> None:
    set_ = {"https_proxy": "http://proxy:3128"}
    assert parse("tuning.example.org:1").proxy(set_) == "https_proxy"
    assert parse("tuning.example.org:1").proxy(set_ | {"grpc_proxy": "http://other:1"}) == "grpc_proxy"
    assert parse("tuning.example.org:1").proxy(set_ | {"no_proxy": "localhost, example.org"}) == ""
    assert parse("tuning.example.org:1").proxy({"HTTPS_PROXY": "not one that gRPC reads"}) == ""
    assert {parse(text).proxy(set_) for text in ("localhost:1", "127.0.0.9:1", "[::1]:1")} == {""}
