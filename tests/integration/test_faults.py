"""Processes killed for real: a run ends with the bytes of an undisturbed one, and nothing is left behind."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from offsite.client import Choice, RunSpec
from offsite.protos.errors import InputError, RunError
from offsite.protos.security.pki import Authority
from offsite.protos.spec import TrainingSpec


def digests(run: Any) -> dict[str, str]:
    return {artifact.name: artifact.digest for artifact in run.status.artifacts}


def trainers(federation: Any) -> list[int]:
    """Trainer processes of this federation: their standard error is the log of a rank."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if "offsite.client.site.trainer" in (process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                logs = [Path(file.path) for file in process.open_files()]
                found += [process.pid for log in logs if federation.folder in log.parents and "rank-" in log.name]
    return found


def test_a_killed_coordinator_and_a_killed_site_finish_with_the_same_bytes(federation: Any, wait: Any) -> None:
    spec: RunSpec = federation.spec(rounds=2)
    federation.address = "[::1]:0"  # IPv6, from the first look to the last byte
    assert federation.coordinate().startswith("[::1]:")
    federation.join("hospital")
    with federation.connect() as session:
        undisturbed = digests(session.submit(spec).wait())

    with federation.connect() as session:
        run = session.submit(spec)
        wait(lambda: [t for t in federation.events("hospital", "task") if t["run"] == run.id], "the task")
        wait(lambda: trainers(federation), "a trainer")
        federation.kill("hospital")
        wait(lambda: not trainers(federation), "the end of an orphaned trainer")
        federation.kill("coordinator")
        federation.coordinate()
        federation.join("hospital")
        wait(lambda: federation.events("hospital", "uploaded"), "an upload")
        federation.kill("coordinator")  # somewhere between an upload and the next task
        federation.coordinate()
        steps = [event.data["step"] for event in run.watch() if event.kind == "step"]
        assert digests(run.refresh()) == undisturbed
        assert steps.count("version:0") == 1, "what was done is not done again"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("bottleneck", {"width": 4}), ("paca", {"rank": 4})])
def test_what_is_beside_the_maps_or_some_columns_is_trained_by_zero_2_and_a_kill_leaves_no_trace(
    name: str, settings: dict[str, int], federation: Any, wait: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from offsite.emulator.plug import load

    method = Choice(name=name, settings=settings)
    exam = {"exam": str(federation.material / "held-out.jsonl")}
    spec = federation.spec(rounds=2, method=method, sites=("hospital",), evaluation=exam)
    allowed = f'bases = ["any"]\nmethods = ["{name}"]\n'
    federation.coordinate()
    federation.join("hospital", policy=allowed, engine="deepspeed")
    with federation.connect() as session:
        if name == "bottleneck":
            with pytest.raises(InputError, match="merge: what bottleneck trains.*leave merge out"):
                session.submit(replace(spec, merge=True))
        first = session.submit(spec)
        folder = first.result(tmp_path / "out")
        assert first.report["overall"]["plug_in"] < first.report["overall"]["base_zero_shot"]
        load(AutoModelForCausalLM.from_pretrained(federation.material / "model"), folder / "adapter")

        run = session.submit(spec)
        wait(lambda: [t for t in federation.events("hospital", "task") if t["run"] == run.id], "the task")
        wait(lambda: trainers(federation), "a trainer")
        federation.kill("hospital")
        wait(lambda: not trainers(federation), "the end of an orphaned trainer")
        federation.kill("coordinator")
        federation.coordinate()
        federation.join("hospital", policy=allowed, engine="deepspeed")
        assert digests(run.wait()) == digests(first)


@pytest.mark.slow
def test_a_cancelled_run_stops_its_sites_and_they_take_the_next(coordinated: Any, wait: Any) -> None:
    federation = coordinated
    federation.have("hospital")

    def asked(**changes: Any) -> RunSpec:
        return federation.spec(sites=("hospital",), **changes)  # type: ignore[no-any-return]

    def count(event: str) -> int:
        return len(federation.events("hospital", event))

    with federation.connect() as session:
        run = session.submit(asked(training=TrainingSpec(steps=100_000, max_length=32)))
        with pytest.raises(RunError, match="does not allow it .max_steps.: ask for fewer"):
            run.wait()
        steps, stops = count("step"), count("stopped")
        run = session.submit(asked(training=TrainingSpec(steps=1000, max_length=32)))
        wait(lambda: count("step") > steps, "a training step")
        assert run.cancel().state == "cancelled"
        wait(lambda: not trainers(federation), "the end of the trainer")
        wait(lambda: count("stopped") > stops, "that the site says so")
        with pytest.raises(RunError, match="cancelled by olga"):
            run.wait()
        assert session.submit(asked()).wait().state == "completed"


def test_a_site_does_not_touch_a_task_that_its_owner_has_not_signed(coordinated: Any, tmp_path: Path) -> None:
    federation = coordinated
    kit = federation.authority.issue("site", "wary")
    Authority.create(tmp_path / "other")
    (kit / "owner.pub").write_bytes((tmp_path / "other" / "owner.pub").read_bytes())
    federation.join("wary", data=federation.material / "hospital.jsonl")
    with federation.connect() as session:
        run = session.submit(federation.spec(sites=("wary",)))
        assert "the signature of this task" in federation.expect("wary", "waiting")["message"]
        assert federation.events("wary", "task") == []
        run.cancel()


@pytest.mark.slow
def test_a_site_that_fails_is_left_out_and_named(coordinated: Any) -> None:
    federation = coordinated
    federation.have("hospital")
    federation.join("choosy", data=federation.material / "bank.jsonl", policy='bases = ["sha256:0000"]\n')
    with federation.connect() as session:
        run = session.submit(federation.spec(min_sites=1, sites=("choosy", "hospital"))).wait()
        assert [left["site"] for left in run.report["left_out"]] == ["choosy"]
        assert "bases" in run.report["left_out"][0]["message"]
        with pytest.raises(RunError, match="got 1 of at least 2 updates .choosy: refused: .*policy"):
            session.submit(federation.spec(min_sites=2, sites=("choosy", "hospital"))).wait()
        with pytest.raises(RunError, match="site school did not enrol within 1 s .here: .*choosy, .*hospital"):
            session.submit(federation.spec(sites=("school",), wait_s=1.0)).wait()
