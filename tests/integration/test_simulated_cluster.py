"""A simulation whose sites train on the machines of a Ray cluster, too, ends in the bytes of one machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .clusters import Cluster
from .conftest import ENVIRONMENT, alone, wait_until, write_material
from .machines import Machine

pytestmark = [pytest.mark.slow, pytest.mark.long]

PLUGIN = Path(__file__).parents[1] / "plugin" / "offsite_top.py"
# Trains as a site's trainer does, but leaves a mark on the machine where it is, and waits there while a round is held.
LEAVING_A_MARK = """
import time
from pathlib import Path
from offsite.deploy.simulation.visit import own_training

def train(visit):
    marks = Path.home() / "marks"
    marks.mkdir(exist_ok=True)
    (marks / f"{visit.task.round}-{visit.site}").touch()
    while (Path.home() / f"held-{visit.task.round}").exists():
        time.sleep(0.05)
    return own_training(visit)
"""
RUN = """
model = "{material}/model"
public = "{material}/public.jsonl"
rounds = 3
builders = "crash(keep=5)"
trainable = "ends(bottom=1,top=1)"
method = "lora(rank=4)"
upload = "top(share=0.5)"
[training]
steps = 4
max_length = 32
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is installed on all machines: what trains, and a stage that feeds back."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "marking.py").write_text(LEAVING_A_MARK)
    shutil.copy(PLUGIN, folder)
    about = folder / "offsite_top-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: offsite-top\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[offsite.stages]\ntop = offsite_top:Top\n")
    return folder


class Simulated:
    """A simulation in the head's machine, whose run and data are there alone."""

    def __init__(self, machine: Machine, out: str, *more: str, **environment: str) -> None:
        self.folder, self._log = machine.folder / out, machine.folder / f"{out}.log"
        simulate = ["simulate", "run.toml", "--data", "material/bank.jsonl", "--sites", "24", "--workers", "1"]
        simulate += ["--partition", "iid(rows=16)", "--policy", "policy.toml", "--train", "marking:train"]
        with self._log.open("wb") as log:
            self.process = machine.popen(
                [sys.executable, "-m", "offsite.client", *simulate, "--out", out, "--format", "json", *more],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT | environment,
            )

    def outcome(self) -> tuple[bytes, Any]:
        """Return the adapter's bytes, and what the report says but for what took how long."""
        assert self.process.wait(timeout=180) == 0, self._log.read_text()
        report = self.events()[-1]
        assert report["event"] == "report"
        rounds = [{**one, "users_per_s": 0} for one in report["simulation"]["rounds"]]
        adapter = (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        return adapter, (rounds, report["overall"], [one["sites"] for one in report["rounds"]])

    def events(self) -> list[dict[str, Any]]:
        """What it has said so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    @property
    def notes(self) -> str:
        """What it has said of machines so far."""
        return "\n".join(event["message"] for event in self.events() if event["event"] == "note")


def marks(machine: Machine, number: int) -> set[str]:
    """Return the sites whose work of a round began on a machine."""
    return {path.name.partition("-")[2] for path in (machine.folder / "marks").glob(f"{number}-*")}


def hold(machine: Machine, number: int) -> Path:
    """Have each site's training of a round wait on a machine, until the file is removed that this returns."""
    (machine.folder / f"held-{number}").touch()
    return machine.folder / f"held-{number}"


def test_a_cluster_gives_the_bytes_of_one_machine_though_a_machine_dies(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(packages))
    with alone("head", "worker") as made:
        head, worker = made
        write_material(head.folder / "material")
        (head.folder / "run.toml").write_text(RUN.format(material=head.folder / "material"))
        (head.folder / "policy.toml").write_text('bases = ["any"]\ndata = ["/"]\nmax_passes = 1e9\nmin_rows = 1\n')
        alone_there = Simulated(head, "one")
        cluster = Cluster(made, wait_until)
        for machine in made:
            cluster.start(machine)
        wanted = alone_there.outcome()
        shutil.rmtree(head.folder / "marks")

        held = [hold(head, number) for number in range(3)]
        hold(worker, 2)
        token = cluster.environment(head)["RAY_AUTH_TOKEN_PATH"]
        two = Simulated(head, "two", "--ray-address", cluster.address, "--ray-token", token)
        for number in range(3):
            wait_until(lambda number=number: marks(worker, number), "a site's work on the other machine")
            if number == 2:
                next(one for one in worker.processes if one.name() == "raylet").kill()
                wait_until(lambda: f"machine {worker.address} has left the simulation" in two.notes, "a word of it")
            held[number].unlink()
        assert two.outcome() == wanted
        assert f"machine {worker.address} does 2 sites at a time" in two.notes
        for number in range(2):
            assert not marks(head, number) & marks(worker, number), "each site's work is done once"
        assert len(marks(head, 2)) == 24 and marks(worker, 2), "what was under way is done again"
