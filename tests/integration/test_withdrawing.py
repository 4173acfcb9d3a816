"""A site that is withdrawn from a real run: what is left equals, byte for byte, a run in which it never took part."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client import Choice, RunSpec, TrainingSpec
from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.replaying import CERTIFICATE
from offsite.coordinator.runs.withdrawing import again, take_back
from offsite.protos.documents import parse, to_json, to_plain
from offsite.protos.security.pki import Authority

from .inline import Site, live


@pytest.mark.slow
def test_what_is_done_again_without_a_site_is_a_run_without_it(tmp_path: Path, material: Path) -> None:
    torch.set_num_threads(1)
    home = Home(tmp_path / "home", Authority.create(tmp_path / "pki").issue("coordinator", "coordinator")).prepare()
    journal = home.journal()
    sites = {name: Site(tmp_path / name, material / f"{name}.jsonl") for name in ("bank", "hospital")}

    def run(name: str, spec: RunSpec, **granted: Any) -> dict[str, str]:
        grant = to_plain(parse(Grant, to_plain(spec), where="run")) | granted
        journal.add_run(name, token=name, owner="olga", spec=to_json(spec), granted=grant)
        journal.begin_run(name, list(spec.sites))
        live(home, sites, run=name)
        assert journal.run(name).state == "completed", journal.run(name).error
        return {file.name: file.digest for file in journal.artifacts(name)}

    def adapter(files: dict[str, str]) -> dict[str, str]:
        return {name: digest for name, digest in files.items() if name.startswith("adapter/")}

    def trained(site: str, name: str) -> int:
        return len(list((tmp_path / site).glob(f"{name}-*")))

    fields: dict[str, Any] = {
        "model": str(material / "model"),
        "builders": (Choice(name="crash", settings={"keep": 5}),),
        "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
        "method": Choice(name="lora", settings={"rank": 4, "alpha": 8.0, "ranks": {"bank": 2}}),
        "training": TrainingSpec(steps=4, learning_rate=0.01, max_length=32, seed=3),
        "public": str(material / "public.jsonl"),
        "exam": "none",
    }
    for rounds in (1, 2):
        together = run(f"both{rounds}", RunSpec(**fields, rounds=rounds, sites=("bank", "hospital")))
        alone = run(f"alone{rounds}", RunSpec(**fields, rounds=rounds, sites=("hospital",)))
        spec, replays = again(journal, f"both{rounds}", "bank", by="olga", reason="consent was withdrawn")
        take_back(journal, replays)
        rest = run(f"rest{rounds}", spec, replays=to_plain(replays))
        assert adapter(rest) == adapter(alone) != adapter(together) and CERTIFICATE in rest
        assert (trained("hospital", f"rest{rounds}"), trained("bank", f"rest{rounds}")) == (rounds - 1, 0)
        assert journal.artifacts(f"both{rounds}") == []
