"""What the pages say, and when: all of it comes through the SDK from a coordinator over gRPC."""

import json
import time
from typing import Any

from offsite.protos import runs_pb2 as pb
from offsite.protos.events import (
    Cancelled,
    Completed,
    EmulatorBuilt,
    Measured,
    RoundDone,
    Selected,
    SiteState,
    StepBegun,
    UpdateAccepted,
)
from offsite.protos.figures import Score

from .conftest import Browser, Coordinator

SCORE = {"exam": Score(nll=20.0, tokens=10)}
REPORT: dict[str, Any] = {
    "run": "r1",
    "task": "ward",
    "method": {"name": "lora"},
    "strategy": {"name": "low-rank"},
    "memory": {"name": "none"},
    "sites": {"ward": {"base_zero_shot": 8.0, "plug_in": 4.0}},
    "overall": {"base_zero_shot": 8.0, "plug_in": 4.0},
    "tokens": {"ward": 10},
    "marks": {"overall": {"plug_in": "it is <doubted>"}},
    "attacks": [{"name": "heal", "overall": 6.5}],
    "protection": {"label": "not protected", "reason": "the attack is stronger"},
    "warnings": ["a warning"],
    "rounds": [{}],
    "bytes": {"down": 5_000_000, "up": 1_000_000},
    "seconds": {"training": 3, "evaluation": 2, "loading": 1, "download": 0, "overhead": 1, "total": 7},
}


def round_of(number: int, *sites: str) -> list[Any]:
    """A round of sites that all send."""
    states = [
        SiteState(round=number, site=site, state=state, step=at, steps=2, loss=3.0 - at, bytes_down=2_000_000)
        for site in sites
        for at, state in enumerate(("downloading", "training", "uploading"))
    ]
    kept = [UpdateAccepted(round=number, site=site, loss=1.5, bytes=9000, examples=3) for site in sites]
    return [*states, *kept, RoundDone(round=number, sites=len(sites), figures={})]


def test_the_first_page_has_runs_and_sites_and_who_it_speaks_as(browser: Browser, coordinator: Coordinator) -> None:
    assert "No runs yet" in browser.page("/") and "alice, researcher, at 127.0.0.1:" in browser.page("/")
    coordinator.add("r1", name="notes <b>of wards</b>", rounds=3)
    coordinator.add("r2", state="failed")
    coordinator.runs["r2"].error = "no site came"
    coordinator.sites = [pb.Site(name="ward", seen_at=time.time() - 300, examples=1200, version="0.1")]
    coordinator.tell(
        "r1", Selected(sites=("ward",)), SiteState(round=1, site="ward", state="training", step=1, steps=2)
    )
    text = browser.stream("/live", "training")
    assert "notes &lt;b&gt;of wards&lt;/b&gt;" in text and "<b>of" not in text and "0 of 3" in text
    assert "no site came" in text and text.index("/runs/r2") < text.index("/runs/r1"), "the newest first"
    assert "5 min ago" in text and "1,200" in text


def test_a_run_is_followed_round_by_round_without_a_reload(browser: Browser, coordinator: Coordinator) -> None:
    coordinator.add("r1", rounds=2)
    first = browser.page("/runs/r1")
    assert "None is chosen yet" in first and "Cancel the run" in first and 'hx-sse:connect="/runs/r1/live"' in first
    built = EmulatorBuilt(layers=(0, 5), bytes=7_000_000, disclosed=0.5, learning_rate=0.003, computed="fp32")
    coordinator.tell("r1", Selected(sites=("bank", "ward")), StepBegun(step="version:0"), built)
    coordinator.tell("r1", Measured(name="base_zero_shot", sets=SCORE), *round_of(1, "bank", "ward"))
    text = browser.stream("/runs/r1/live", "averaged")
    assert "chose the sites bank, ward" in text and "50% of the base" in text, (
        "the audit trail says what was handed out"
    )
    assert "4.0 MB went down to the sites, 18.0 kB came up" in text and "7.39" in text
    failed = SiteState(round=2, site="bank", state="refused", message="rounds: its policy allows one")
    coordinator.tell(
        "r1", failed, *round_of(2, "ward"), Measured(name="plug_in", sets=SCORE), Completed(), state="completed"
    )
    assert "the run is completed" in browser.stream("/runs/r1/live", "the run is completed")
    after = browser.stream("/runs/r1/live", "state completed")
    assert "bank refused: rounds: its policy allows one" in after and "Cancel the run" not in after
    assert 'hx-target="#head" hx-swap="innerMorph"' in after


def test_a_completed_run_shows_what_its_report_says(browser: Browser, coordinator: Coordinator) -> None:
    coordinator.add("r1", state="completed", report=REPORT, task="ward")
    coordinator.runs["r1"].artifacts.append(
        pb.Artifact(name="adapter/adapter_model.safetensors", digest="blake3:0", size=4_500_000)
    )
    coordinator.lineage = [
        pb.Version(run="r1", round=1, owner="alice", task="ward", at=1.7e9, figures={"plug_in": 4.0})
    ]
    coordinator.tell("r1", *round_of(1, "ward"), Completed())
    text = browser.stream("/runs/r1/live", "Learned and forgotten")
    for part in (
        "it is &lt;doubted&gt;",
        "heal",
        "6.50",
        "Not protected: the attack is stronger",
        "a warning",
        "4.5 MB",
    ):
        assert part in text
    assert "2.079" in text and "1.386" in text, "losses of the task: ln 8 before, ln 4 after"
    assert 'aria-label="run r1 ward, round 1, plug-in 4.00"' in text


def test_a_report_that_is_none_is_said_to_be_none(browser: Browser, coordinator: Coordinator) -> None:
    coordinator.add("r1", state="completed", report={"overall": {}})
    assert "not as this version has it" in browser.page("/runs/r1", status=500)


def test_a_run_file_is_submitted_and_leads_to_its_run(browser: Browser, coordinator: Coordinator) -> None:
    token = "0123456789abcdef"
    sent = {"spec": 'model = "base"\nname = "mine"\nrounds = 2\n', "token": token}
    status, _, onward = browser.post("/runs", **sent)
    assert status == 204 and json.loads(onward)["path"] == "/runs/01234567"
    assert browser.post("/runs", **sent)[0] == 204 and len(coordinator.runs) == 1, "a second click is the same run"
    draft = browser.page("/submit?like=01234567&start=01234567:1")
    assert "name = &#34;mine&#34;" in draft and "start = &#34;01234567:1&#34;" in draft


def test_what_is_wrong_with_a_run_file_stands_beside_it(browser: Browser, coordinator: Coordinator) -> None:
    for spec, why in (("model =", "not valid TOML"), ('model = "m"\nrounds = 0', "rounds"), ("", "model")):
        status, text, _ = browser.post("/runs", spec=spec, token="t" * 32)
        assert status == 200 and why in text and "<html" not in text
    assert not coordinator.runs


def test_what_the_role_may_not_is_said_in_the_coordinator_s_words(browser: Browser, coordinator: Coordinator) -> None:
    coordinator.refusal = "ada has a certificate for role auditor; this call needs role owner or researcher"
    status, text, _ = browser.post("/runs", spec='model = "base"', token="t" * 32)
    assert status == 200 and coordinator.refusal in text
    assert coordinator.refusal in browser.post("/runs/r1/cancel")[1]


def test_a_run_is_cancelled(browser: Browser, coordinator: Coordinator) -> None:
    coordinator.add("r1")
    assert browser.post("/runs/r1/cancel")[0] == 204 and coordinator.runs["r1"].state == "cancelled"
    coordinator.tell("r1", Cancelled(error="cancelled by alice"))
    assert "cancelled by alice" in browser.stream("/runs/r1/live", "cancelled by alice")
    assert "there is no run &#39;nowhere&#39;" in browser.page("/runs/nowhere", status=404)


def test_versions_are_taken_back_with_a_reason(browser: Browser, coordinator: Coordinator) -> None:
    coordinator.add("r1", state="completed", rounds=2)
    coordinator.lineage = [pb.Version(run="r1", round=at, owner="alice", at=1.7e9) for at in (1, 2)]
    assert "taken back" not in browser.stream("/runs/r1/live", "r1:2")
    assert browser.post("/runs/r1/rollback", version="r1:1", reason="it forgot")[0] == 204
    assert "taken back by alice" in browser.stream("/runs/r1/live", "it forgot")
    assert "expected RUN:ROUND" in browser.post("/runs/r1/rollback", version="r1", reason="why")[1]
    assert "go on from r1:2" in browser.stream("/versions/live", "go on from r1:2")


def test_a_coordinator_that_is_away_is_said_to_be_and_the_page_goes_on(
    browser: Browser, coordinator: Coordinator
) -> None:
    coordinator.add("r1")
    browser.page("/runs/r1")
    coordinator.refusal = "the certificate of alice was revoked"
    assert 'hx-target="#trouble"' in browser.stream("/runs/r1/live", "was revoked")
    coordinator.refusal = ""
    assert 'hx-target="#head"' in browser.stream("/runs/r1/live", "Cancel the run")
