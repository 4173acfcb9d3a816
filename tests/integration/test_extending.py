"""A run that is made to overfit stops in time, and its extension is what a run of that length would have been."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client import Choice, RunSpec, TrainingSpec
from offsite.coordinator.home import Home
from offsite.coordinator.runs.continuing import ancestor
from offsite.coordinator.runs.extending import extension
from offsite.coordinator.runs.grant import Grant
from offsite.protos.documents import parse, to_json, to_plain
from offsite.protos.security.pki import Authority

from .inline import Site, live


@pytest.mark.slow
def test_it_stops_at_the_best_version_and_its_extension_has_the_bytes_of_a_longer_run(
    tmp_path: Path, material: Path
) -> None:
    torch.set_num_threads(1)
    home = Home(tmp_path / "home", Authority.create(tmp_path / "pki").issue("coordinator", "coordinator")).prepare()
    journal, sites = home.journal(), {"hospital": Site(tmp_path / "hospital", material / "hospital.jsonl")}

    def run(name: str, spec: RunSpec) -> dict[str, Any]:
        start = ancestor(journal, spec.start) if spec.start else None
        granted = to_plain(parse(Grant, to_plain(spec) | {"continues": start}, where="run"))
        journal.add_run(name, token=name, owner="olga", spec=to_json(spec), granted=granted)
        journal.begin_run(name, ["hospital"])
        live(home, sites, run=name)
        row = journal.run(name)
        assert row.state == "completed", row.error
        return dict(json.loads(row.report))

    def files(name: str, folder: str) -> dict[str, str]:
        return {file.name: file.digest for file in journal.artifacts(name) if file.name.startswith(folder)}

    fields: dict[str, Any] = {
        "model": str(material / "model"),
        "builders": (Choice(name="crash", settings={"keep": 5}),),
        "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
        "method": Choice(name="lora", settings={"rank": 4, "alpha": 8.0}),
        "training": TrainingSpec(steps=8, learning_rate=0.1, max_length=32, seed=3),
        "public": str(material / "public.jsonl"),
        "evaluation": {"exam": str(material / "held-out.jsonl")},
    }
    report = run("stopped", RunSpec(**fields, rounds=12, patience=1))
    end, losses = report["outcome"], [one["figures"]["plug_in"] for one in report["rounds"]]
    assert end["last"] == len(losses) == end["round"] + 1 < 12, losses
    assert losses[end["round"] - 1] == min(losses) == report["overall"]["plug_in"]
    run("best", RunSpec(**fields, rounds=end["round"]))
    run("last", RunSpec(**fields, rounds=end["last"] + 1))
    assert files("stopped", "adapter/") == files("best", "adapter/") != {}
    assert files("stopped", "last/") and files("stopped", "last/") != files("stopped", "adapter/")

    run("more", extension(journal, "stopped", rounds=1))
    assert files("more", "adapter/") == files("last", "adapter/") != {}
    run("from-best", extension(journal, "stopped", rounds=2, number=end["round"]))
    assert files("from-best", "adapter/") == files("last", "adapter/")
