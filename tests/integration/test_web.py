"""The web page of a real coordinator: a run is submitted and cancelled there, as a browser does it."""

import http.client
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest


class Browser:
    """Comes by the link that `offsite web` says, keeps the cookie, and sends forms as the page does."""

    def __init__(self, link: str) -> None:
        self._host, path = re.fullmatch(r"http://([^/]+)(/.*)", link).groups()  # type: ignore[union-attr]
        self._headers: dict[str, str] = {}
        answer, _ = self.ask("GET", path)
        self._headers["Cookie"] = str(answer.headers["Set-Cookie"]).partition(";")[0]
        (form,) = re.findall(r'"X-Form-Token": "([\w-]+)"', self.page("/submit"))
        self._headers |= {"X-Form-Token": form, "Origin": f"http://{self._host}", "HX-Request": "true"}

    def ask(self, method: str, path: str, **fields: str) -> tuple[http.client.HTTPResponse, str]:
        connection = http.client.HTTPConnection(self._host, timeout=60)
        kind = {"Content-Type": "application/x-www-form-urlencoded"} if fields else {}
        connection.request(method, path, urlencode(fields) or None, self._headers | kind)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer, text

    def page(self, path: str) -> str:
        answer, text = self.ask("GET", path)
        assert answer.status == 200, text
        return text


@pytest.mark.slow
def test_a_run_is_submitted_watched_and_cancelled_in_the_page(
    tmp_path: Path, federations: Any, material: Path, wait: Any
) -> None:
    with federations(tmp_path) as federation:
        address = federation.coordinate()
        kit = str(federation.owner)
        federation.start("web", "web", "--coordinator", address, "--identity", kit, "--format", "json")
        link = wait(lambda: re.search(r'"link": "(.+)"', federation.log("web").read_text()), "the link")[1]
        browser = Browser(link)
        assert "No runs yet" in browser.page("/") and "olga, owner" in browser.page("/")

        answer, said = browser.ask("POST", "/runs", spec='model = "m"\nround = 3', token="a" * 32)
        assert "round" in said and "HX-Location" not in answer.headers, "what is wrong is shown beside the form"
        named = {"model": str(material / "model"), "public": str(material / "public.jsonl"), "name": "by hand"}
        spec = "\n".join(f"{field} = {json.dumps(value)}" for field, value in named.items()) + '\nsites = ["nowhere"]'
        answer, said = browser.ask("POST", "/runs", spec=spec, token="b" * 32)
        assert "HX-Location" in answer.headers, said
        place = json.loads(answer.headers["HX-Location"])["path"]
        again, _ = browser.ask("POST", "/runs", spec=spec, token="b" * 32)
        assert json.loads(again.headers["HX-Location"])["path"] == place, "once, however often the form is sent"

        with federation.connect(federation.owner) as session:
            run = session.run(place.rpartition("/")[2])
            assert run.spec.name == "by hand" and run.state in ("queued", "waiting", "running")
            assert "by hand" in browser.page(place) and "by hand" in browser.page("/")
            answer, _ = browser.ask("POST", f"{place}/cancel")
            assert answer.status == 204
            assert run.refresh().state == "cancelled" and run.error == "cancelled by olga"
        wait(lambda: "cancelled" in browser.page(place), "the page's knowing of it")
        assert len(federation.tree("web")) == 1
