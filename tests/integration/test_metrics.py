"""What both ends tell a monitoring system of a run, and the dashboard that asks for it."""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "offsite.json"
SITE = "clinic"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with OPENER.open(f"http://{address}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(address: str) -> dict[str, float]:
    """Every sample, by its name and labels as they are written."""
    samples = {}
    for family in text_string_to_metric_families(get(address, "/metrics")[1]):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def names(samples: dict[str, float]) -> set[str]:
    return {name.partition("{")[0] for name in samples}


def asked(dashboard: dict[str, Any]) -> set[str]:
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [one["definition"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return {name for query in queries for name in re.findall(r"\b(?:offsite|process)_[a-z_]+", query)}


@pytest.mark.slow(alone=True)
def test_both_ends_tell_of_a_run_what_the_dashboard_asks_for(coordinated: Any, wait: Any) -> None:
    coordinated.join(SITE, data=coordinated.material / "hospital.jsonl", cold=True)  # its trainers are its own
    gateway = coordinated.events("coordinator", "ready")[-1]["metrics"]
    site = coordinated.events(SITE, "metrics")[-1]["address"]
    before, at_site = scrape(gateway), scrape(site)
    with coordinated.connect() as session:
        run = session.submit(coordinated.spec(rounds=2, sites=(SITE,))).wait()
        moved = run.report["bytes"]
    wait(lambda: scrape(site)["offsite_site_state{state=waiting}"] == 1, "the site is done")
    after, then = scrape(gateway), scrape(site)

    def more(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert more("offsite_runs{state=completed}") == 1 and more("offsite_uploads_total{outcome=accepted,reason=}") == 2
    assert more("offsite_transferred_bytes_total{direction=up}") == moved["up"]
    assert more("offsite_transferred_bytes_total{direction=down}") >= moved["down"] > 0, "others may have been served"
    for step, count in {"build": 1, "aggregate": 2, "publish": 1}.items():
        assert more(f"offsite_step_seconds_count{{step={step}}}") == count, step
    assert more("offsite_journal_write_seconds_count") > 5 and more("offsite_event_loop_lag_seconds_count") > 0
    assert (
        then["offsite_site_tasks_total{outcome=uploaded}"] - at_site["offsite_site_tasks_total{outcome=uploaded}"] == 2
    )
    assert then["offsite_site_steps_total"] - at_site["offsite_site_steps_total"] == 2 * 4
    assert (
        then["offsite_site_bytes_total{direction=up}"] - at_site["offsite_site_bytes_total{direction=up}"]
        == moved["up"]
    )
    assert then["offsite_site_trainer_memory_bytes"] > 50e6 and then["offsite_site_connected"] == 1

    wanted, told = asked(json.loads(DASHBOARD.read_text())), names(after) | names(then)
    assert len(wanted) > 25 and wanted <= told, wanted - told
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in told if name.startswith("offsite_")}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in wanted}
    assert ours - shown == {"offsite_info", "offsite_site_info"}, "what is told is also shown"
    for address in (gateway, site):
        assert get(address, "/healthz") == get(address, "/readyz") == (200, "ok\n")
        assert get(address, "/")[0] == 404
        text = get(address, "/metrics")[1]
        assert SITE not in text and str(coordinated.folder) not in text and run.id not in text

    lines = [json.loads(line) for line in coordinated.log("coordinator").read_text().splitlines() if '"level"' in line]
    mine = [line for line in lines if line.get("run") == run.id and line.get("site") == SITE]
    assert [(line["level"], line["round"]) for line in mine] == [("info", 1), ("info", 2)], lines
    assert all("accepted" in line["message"] for line in mine)
    lines = [json.loads(line) for line in coordinated.log(SITE).read_text().splitlines() if '"level"' in line]
    assert {line["site"] for line in lines} == {SITE} and all(line["message"] for line in lines)
    mine = [line for line in lines if line.get("run") == run.id]
    assert [(line["kind"], line["round"]) for line in mine if line["kind"] in ("task", "uploaded")] == [
        *[("task", 1), ("uploaded", 1), ("task", 2), ("uploaded", 2)]
    ]
