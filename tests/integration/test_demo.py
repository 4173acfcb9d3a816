"""`offsite demo`: on a tiny model for everyone, on the real one where there is time."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from offsite.emulator.plug import load

FIGURES = ("base_tuned", "plug_in", "base_zero_shot", "emulator_tuned", "emulator_zero_shot")


def demo(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "offsite.client", "demo", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def tiny(material: Path, *names: str) -> list[str]:
    """The demo's arguments for the tiny model and sites that train in plain torch: DeepSpeed takes longer to import."""
    sites = [f"--site={name}={material / name}.jsonl" for name in names]
    model = ["--model", str(material / "model"), "--public", str(material / "public.jsonl"), "--keep", "5"]
    short = ["--steps", "3", "--max-length", "32", "--precision", "fp32", "--learning-rate", "0.01"]
    return [*model, *sites, *short, "--engine", "plain"]


def check_report(out: Path, *, sites: set[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert report["sites"].keys() == sites
    for row in (report["overall"], *report["sites"].values()):
        assert all(math.isfinite(row[figure]) for figure in (*FIGURES, "attack"))
    (attack,) = report["attacks"]
    assert report["overall"]["attack"] == attack["overall"] and attack["name"].startswith("tuned, unfreeze")
    assert report["protection"]["lost"] > 0 and f"that was made ({attack['name']})" in report["protection"]["reason"]
    assert report["bytes"]["down"] > 0 < report["bytes"]["up"]
    time = report["seconds"]
    assert all(time[kind] > 0 for kind in ("total", "training", "evaluation", "loading"))
    assert time["training"] + time["evaluation"] + time["loading"] < 3 * time["total"]
    owner = {path.name for path in (out / "work" / "owner").rglob("*") if path.is_file()}
    assert owner == {"exam.jsonl", "public.jsonl"}, "what is the owner's own, and no site's"
    assert report["owner"].keys() <= {*FIGURES} and report["exam"]["sites"].keys() == sites
    (gains,) = report["exam"]["prediction"]["versions"]
    assert gains["emulator"] > 0 and report["exam"]["prediction"]["reason"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and all(name in page for name in sites)
    return report


def interrupt(out: Path, material: Path) -> None:
    """Send a Ctrl-C in the middle of a run of one site; nothing that was started may be left."""
    running = demo(out, *tiny(material, "hospital"), "--rounds", "50", "--format", "json")
    assert running.stdout is not None
    assert any('"state": "training"' in line for line in running.stdout), "the moment came"
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130 and errors.strip().endswith("offsite: interrupted")
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def finish(out: Path, material: Path) -> list[dict[str, Any]]:
    """Run a demo of two sites and one round to its end; return what it said."""
    running = demo(out, *tiny(material, "hospital", "bank"), "--rounds", "1", "--merge", "--format", "json")
    output, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.slow
@pytest.mark.long
def test_on_the_real_model_the_figures_are_in_the_order_that_offsite_tuning_promises(tmp_path: Path) -> None:
    """In a third of the demo's steps, with half as many sequences in each, and on half of its exam: the figures stand
    well apart there too.
    """
    short = ["--rounds", "1", "--steps", "4", "--batch-size", "2", "--held-out", "8"]
    running = demo(tmp_path / "out", *short, "--format", "json")
    _, errors = running.communicate(timeout=3000)  # against a hang, not for speed
    assert running.returncode == 0, errors
    report = check_report(tmp_path / "out", sites={"hospital", "bank", "helpdesk", "school"})
    figures = report["overall"]
    in_order = [figures[name] for name in FIGURES]
    assert all(low < high for low, high in zip(in_order, in_order[1:], strict=False)), figures
    assert figures["emulator_zero_shot"] < 50 * figures["base_zero_shot"]
    assert not [warning for warning in report["warnings"] if "cannot be right" in warning]
    gained = math.log(figures["base_zero_shot"] / figures["plug_in"])
    assert gained >= 0.2 * math.log(figures["base_zero_shot"] / figures["base_tuned"])
    assert math.log(figures["emulator_tuned"] / figures["plug_in"]) >= 0.5
    assert figures["attack"] < figures["emulator_tuned"], "what a site could do is more than it is asked to"
    assert report["protection"]["label"] == "not protected"


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_behind_and_the_same_command_works_again(tmp_path: Path, material: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, material)
    lines = finish(out, material)
    assert lines[-1]["event"] == "report" and {"update", "round", "completed"} <= {line.get("kind") for line in lines}
    report = check_report(out, sites={"hospital", "bank"})
    assert report["overall"]["plug_in"] < report["overall"]["base_zero_shot"]
    base = AutoModelForCausalLM.from_pretrained(material / "model")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, out / "adapter")(ids).logits
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_what_no_weight_takes_in_is_published_attacked_and_loaded_again(tmp_path: Path, material: Path) -> None:
    out, method = tmp_path / "out", ("--method", "bottleneck(width=4)")
    running = demo(out, *tiny(material, "hospital", "bank"), "--rounds", "1", *method, "--format", "json")
    _, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    report = check_report(out, sites={"hospital", "bank"})
    assert report["overall"]["plug_in"] < report["overall"]["base_zero_shot"]
    base = AutoModelForCausalLM.from_pretrained(material / "model")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = base(ids).logits
        assert not torch.allclose(load(base, out / "adapter")(ids).logits, before, atol=1e-3)


def test_a_merged_model_of_what_no_weight_takes_in_is_refused_before_anything_starts(
    tmp_path: Path, offsite: Any
) -> None:
    refused = offsite("demo", "--out", str(tmp_path / "out"), "--method", "bottleneck", "--merge")
    assert refused.returncode == 3
    assert "--merge: what bottleneck trains is no change of the base's weights" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stream_of_tasks_is_learned_one_after_the_other_and_says_what_was_forgotten(
    tmp_path: Path, material: Path
) -> None:
    running = demo(
        tmp_path / "out", "--tasks", *tiny(material, "hospital", "bank"), "--rounds", "1", "--format", "json"
    )
    output, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    told = json.loads(output.splitlines()[-1])
    assert told.pop("event") == "forgetting" and told == json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert [(stage["task"], stage["memory"]) for stage in told["stages"]] == [("hospital", "lae"), ("bank", "lae")]
    assert told["stages"][1]["kept_bytes"] > 0 < told["stages"][0]["bytes_up"]
    base, first, last = told["losses"]
    assert first["hospital"] < base["hospital"] and last["bank"] < base["bank"]
    assert told["summary"]["forgetting"] == pytest.approx(last["hospital"] - first["hospital"])
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "forgetting.svg").read_text().count("after bank") == 1
