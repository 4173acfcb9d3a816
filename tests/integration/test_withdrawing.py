"""A site that is withdrawn from a real run: what is left equals, byte for byte, a run in which it never took part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client import Choice, RunSpec, TrainingSpec
from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.replaying import CERTIFICATE
from offsite.coordinator.runs.withdrawing import again, take_back
from offsite.coordinator.store.journal import Row
from offsite.protos.documents import parse, to_json, to_plain
from offsite.protos.security.pki import Authority

from .inline import Site, live


class Stage:
    """A coordinator and two sites in this process."""

    def __init__(self, folder: Path, material: Path) -> None:
        self.folder, self.material = folder, material
        kit = Authority.create(folder / "pki").issue("coordinator", "coordinator")
        self.home = Home(folder / "home", kit).prepare()
        self.journal = self.home.journal()
        self.sites = {name: Site(folder / name, material / f"{name}.jsonl") for name in ("bank", "hospital")}
        self.fields: dict[str, Any] = {
            "model": str(material / "model"),
            "builders": (Choice(name="crash", settings={"keep": 5}),),
            "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
            "method": Choice(name="lora", settings={"rank": 4, "alpha": 8.0, "ranks": {"bank": 2}}),
            "training": TrainingSpec(steps=4, learning_rate=0.01, max_length=32, seed=3),
            "public": str(material / "public.jsonl"),
            "exam": "none",
        }

    def run(self, name: str, spec: RunSpec, **granted: Any) -> dict[str, str]:
        """Do a run to its end, and return what it published."""
        grant = to_plain(parse(Grant, to_plain(spec), where="run")) | granted
        self.journal.add_run(name, token=name, owner="olga", spec=to_json(spec), granted=grant)
        self.journal.begin_run(name, list(spec.sites))
        live(self.home, self.sites, run=name)
        assert self.journal.run(name).state == "completed", self.journal.run(name).error
        return {file.name: file.digest for file in self.journal.artifacts(name)}

    def trained(self, site: str, name: str) -> int:
        """Return how many tasks of a run a site has done."""
        return len(list((self.folder / site).glob(f"{name}-*")))


def adapter(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.startswith("adapter/")}


@pytest.fixture
def stage(tmp_path: Path, material: Path) -> Stage:
    torch.set_num_threads(1)
    return Stage(tmp_path, material)


@pytest.mark.slow
def test_what_is_done_again_without_a_site_is_a_run_without_it(stage: Stage) -> None:
    for rounds in (1, 2):
        together = stage.run(f"both{rounds}", RunSpec(**stage.fields, rounds=rounds, sites=("bank", "hospital")))
        alone = stage.run(f"alone{rounds}", RunSpec(**stage.fields, rounds=rounds, sites=("hospital",)))
        spec, replays = again(stage.journal, f"both{rounds}", "bank", by="olga", reason="consent was withdrawn")
        take_back(stage.journal, replays)
        rest = stage.run(f"rest{rounds}", spec, replays=to_plain(replays))
        assert adapter(rest) == adapter(alone) != adapter(together) and CERTIFICATE in rest
        assert (stage.trained("hospital", f"rest{rounds}"), stage.trained("bank", f"rest{rounds}")) == (rounds - 1, 0)
        assert stage.journal.artifacts(f"both{rounds}") == []


class Caller(Site):
    """Has a third site come while it works on a first round."""

    def work(self, home: Home, row: Row) -> None:
        if row.round == 0:
            home.journal().enrol("school")
        super().work(home, row)


@pytest.mark.slow
def test_who_joined_in_the_second_of_four_rounds_joins_again_when_another_is_withdrawn(stage: Stage) -> None:
    stage.sites |= {"hospital": Caller(stage.folder / "caller", stage.material / "hospital.jsonl")}
    stage.sites |= {"school": Site(stage.folder / "school", stage.material / "bank.jsonl")}
    spec = RunSpec(**stage.fields, rounds=4, join=True)
    together = stage.run("joined", replace(spec, sites=("bank", "hospital")))
    stage.journal.see_no_longer("school")
    without = stage.run("without", replace(spec, sites=("hospital",)))
    for name, first in (("joined", ["bank", "hospital"]), ("without", ["hospital"])):
        rosters = [sorted(History(stage.journal, name).tiers(at)) for at in range(4)]
        assert rosters == [first, *3 * [[*first, "school"]]]
    stage.journal.see_no_longer("school")
    rest_spec, replays = again(stage.journal, "joined", "bank", by="olga", reason="consent was withdrawn")
    rest = stage.run("rest", rest_spec, replays=to_plain(replays))
    assert adapter(rest) == adapter(without) != adapter(together)
