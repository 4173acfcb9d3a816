"""A gateway's metrics: of work done elsewhere once and by one gateway, and of a store that is away a word."""

import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from offsite.client.site.meter import meter_at as at_site
from offsite.coordinator.home import Home
from offsite.coordinator.service import metrics
from offsite.coordinator.service.meter import Gauged, meter_at
from offsite.coordinator.service.metrics import Metrics
from offsite.protos.addresses import Address
from offsite.protos.errors import InputError, MismatchError, ResourceError

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(made: Metrics, path: str) -> tuple[int, str]:
    try:
        with OPENER.open(f"http://{made.address}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(made: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(get(made, "/metrics")[1])
    return {
        f"{one.name} {' '.join(one.labels.values())}".strip(): one.value for all_ in families for one in all_.samples
    }


@pytest.fixture
def made() -> Any:
    meter = Metrics(Address("127.0.0.1", 0))
    yield meter
    with suppress(OSError):
        meter.end()


def step(home: Home, run: str, name: str, seconds: float) -> None:
    now = time.time()
    journal = home.journal()
    journal.add_run(run, token=run, owner="alice", spec=b"{}")
    spans = [
        {"kind": "loading", "start": now, "end": now + 1},
        {"kind": "building", "start": now + 1, "end": now + seconds},
    ]
    journal.add_step(run, name, {"spans": spans})


@pytest.mark.parametrize("leads", [True, False])
def test_a_step_is_counted_once_by_the_gateway_that_leads(made: Metrics, tmp_path: Path, leads: bool) -> None:
    home = Home(tmp_path / "home", tmp_path).prepare()
    home.use()
    step(home, "earlier", "version:0", 5)
    made.begin(Gauged(home, home.journal(), home.blobs(), lambda: 3, lambda: leads))
    for name in ("version:0", "version:1", "version:2", "bundle:1", "plug_in", "plug_in:1", "base_tuned", "publish"):
        step(home, "run", name, 40)
    home.journal().add_step("run", "sites", {"names": ["ward"]})
    expected = {"build": 1, "aggregate": 2, "realign": 1, "evaluate": 2, "tune": 1, "publish": 1, "attack": 0}
    for _ in range(2):
        told = samples(made)
        counts = {name.split()[1]: told[name] for name in told if name.startswith("offsite_step_seconds_count")}
        assert counts == (expected if leads else dict.fromkeys(expected, 0))
    assert told["offsite_step_seconds_sum aggregate"] == pytest.approx(80 * leads)
    assert (told["offsite_sites_waiting"], told["offsite_leads"], told["offsite_runs queued"]) == (3, leads, 2)


def test_uploads_are_counted_as_what_becomes_of_them(made: Metrics) -> None:
    with made.upload():
        pass
    for error in (MismatchError("x"), MismatchError("y"), InputError("z")):
        with suppress(MismatchError, InputError), made.upload():
            raise error
    told = {name: value for name, value in samples(made).items() if name.startswith("offsite_uploads_total")}
    assert told == {
        "offsite_uploads_total accepted": 1,
        "offsite_uploads_total refused data_loss": 2,
        "offsite_uploads_total refused invalid_argument": 1,
    }


def test_probes_say_in_a_word_what_is_missing(
    made: Metrics, tmp_path: Path, postgresql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FRESH_S", 0.0)
    assert get(made, "/readyz") == (503, "it starts or ends\n") and get(made, "/healthz") == (200, "ok\n")
    home = Home(tmp_path / "home", tmp_path).prepare()
    home.use(journal=postgresql.empty())
    made.begin(Gauged(home, home.journal(), home.blobs(), lambda: 0, lambda: True))
    assert get(made, "/readyz") == (200, "ok\n") and samples(made)["offsite_journal_reachable"] == 1
    postgresql.kill()
    assert get(made, "/readyz") == (503, "the journal cannot be reached; the log says more\n")
    told = samples(made)
    assert told["offsite_journal_reachable"] == 0 and "offsite_sites_present" not in told
    monkeypatch.setattr(metrics, "STUCK_S", -1.0)
    assert get(made, "/healthz") == (503, "the event loop is stuck\n")


def test_an_address_that_cannot_be_had_and_a_package_that_is_missing_are_sentences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for made_at in (meter_at, at_site):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(ResourceError, match=f"--metrics: cannot listen on 127.0.0.1:{port}: .*in use"):
                made_at(f"127.0.0.1:{port}")
        with pytest.raises(InputError, match="expected HOST:PORT"):
            made_at("9464")
        assert made_at("").address is None
    for module in ("offsite.client.site.metrics", "offsite.coordinator.service.metrics"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for made_at in (meter_at, at_site):
        with pytest.raises(ResourceError, match=r"pip install 'offsite\[metrics\]'"):
            made_at("127.0.0.1:0")
