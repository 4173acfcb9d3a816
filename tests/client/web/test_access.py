"""Who the page lets in: nobody without a link, nobody under another name, and no other site's form."""

from pathlib import Path

import pytest

from offsite.client.listening import listening
from offsite.client.web import access as module
from offsite.client.web.access import Access
from offsite.protos.errors import ResourceError

from .conftest import Browser


def test_a_link_lets_one_browser_in_once() -> None:
    access = Access()
    assert access.admit("") == "", "before there is a link none holds"
    first, second = access.link(), access.link()
    assert access.admit(first) == "", "a newer link is the one that holds"
    cookie = access.admit(second)
    assert cookie and access.forms(cookie) and access.admit(second) == ""
    assert not access.forms("") and not access.forms(second) and not access.forms(access.forms(cookie))


def test_a_link_holds_for_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    access, now = Access(), 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    early, now = access.link(), now + 299
    assert access.admit(early)
    late, now = access.link(), now + 301
    assert not access.admit(late)


@pytest.mark.parametrize("path", ["/", "/submit", "/versions", "/live", "/runs/r1", "/runs/r1/files/adapter/x"])
def test_without_a_cookie_nothing_is_shown(browser: Browser, path: str) -> None:
    browser.headers = {}
    text = browser.page(path, status=401)
    assert "opens by a login link" in text and "alice" not in text


def test_a_link_that_was_used_shows_nothing_and_a_cookie_is_out_of_reach_of_scripts_and_other_sites(
    browser: Browser,
) -> None:
    link = f"/login?token={browser.access.link()}"
    with browser.ask("GET", link) as answer:
        assert {"HttpOnly", "SameSite=strict"} <= set(str(answer.headers["Set-Cookie"]).split("; "))
    assert "This page is closed" in browser.page(link, status=401)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "0.0.0.0"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(browser: Browser, host: str) -> None:
    with browser.ask("GET", "/", Host=host) as answer:
        assert answer.status == 421 and b"alice" not in answer.read()


@pytest.mark.parametrize("host", ["localhost:9", "[::1]:9", "127.0.0.1"])
def test_what_a_tunnel_calls_this_machine_will_do(browser: Browser, host: str) -> None:
    with browser.ask("GET", "/submit", Host=host) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"X_Form_Token": ""},
        {"X_Form_Token": "guessed"},
        {"X_Form_Token": "\u00fc"},
    ],
)
def test_a_form_of_another_site_changes_nothing(browser: Browser, wrong: dict[str, str]) -> None:
    for path in ("/runs", "/runs/r1/cancel", "/runs/r1/rollback"):
        with browser.ask("POST", path, **wrong) as answer:
            assert answer.status == 403 and b"did not come from the page" in answer.read()


def test_a_browser_is_told_to_run_nothing_but_the_page_s_own(browser: Browser) -> None:
    for path in ("/", "/submit", "/static/page.css", "/nowhere"):
        with browser.ask("GET", path) as answer:
            rules = str(answer.headers["Content-Security-Policy"]).split("; ")
            assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(rules)
            assert not any("unsafe" in rule or "*" in rule for rule in rules)
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
    folder = Path(module.__file__).parent
    pages = "".join(path.read_text() for path in (folder / "templates").iterdir())
    assert " on" + "click" not in pages and "style=" not in pages and "hx-on" not in pages


def test_a_port_that_is_taken_is_named() -> None:
    with listening(0) as bound, pytest.raises(ResourceError, match=r"cannot listen on 127.0.0.1:\d+: .*--port"):
        with listening(bound.getsockname()[1]):
            pass
