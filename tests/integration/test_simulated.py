"""A simulation is the live run: the same bytes, without the sockets, the certificates and a process for each site."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offsite.client import Choice
from offsite.client.site.policy import Policy
from offsite.deploy import simulate
from offsite.deploy.simulation import simulate as module
from offsite.protos.recipes import parse_one

from ..deploy.simulation.conftest import Here
from .conftest import ENVIRONMENT, Federation, wait_until

SITES = ("bank", "hospital")
LAX = {"max_steps": 1000, "max_learning_rate": 0.01, "max_passes": 1e9, "min_rows": 1}


@pytest.fixture(scope="module")
def folder(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each site's data, as the live ones have it."""
    made = tmp_path_factory.mktemp("sites")
    for site in SITES:
        shutil.copy(material / f"{site}.jsonl", made)
    return made


LORA = Choice(name="lora", settings={"rank": 4, "alpha": 8.0, "ranks": {"bank": 2}})
KINDS: list[Any] = [  # of training: what is not the default of a run
    pytest.param({}, marks=pytest.mark.slow(alone=True), id="as usual"),
    *(
        pytest.param(kind, marks=pytest.mark.slow, id=" and ".join(kind.values()))
        for kind in (
            {"part": 'lisa(layers=1,per="site")'},
            {"part": "ist(share=0.5)"},
            {"part": 'by-capability(shards=3,carries=3,sites={"bank":1})'},
            {"objective": "dpo(beta=1.0)", "optimiser": "natural-galore(rank=2,history=3,every=4)"},
            {"part": "half", "optimiser": "spsa-gc(draws=2)"},
        )
    ),
]


@pytest.fixture
def pairs(coordinated: Federation, folder: Path) -> Path:
    """A folder with pairs of answers for a site each, which has joined: its chosen answers are a site's text."""
    made = coordinated.folder / "pairs"
    made.mkdir()
    for site in SITES:
        rows = [json.loads(line) for line in (folder / f"{site}.jsonl").read_text().splitlines()]
        answers = [row["completion"] for row in rows]
        compared = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
            for row, other in zip(rows, answers[1:] + answers[:1], strict=True)
        ]
        file = made / f"{site}-pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in compared))
        coordinated.join(file.stem, data=file)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_sites_give_the_bytes_of_live_ones(
    coordinated: Federation,
    folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: dict[str, str],
) -> None:
    if kind:  # workers are processes of their own in the first case, and in this one in the others
        monkeypatch.setattr(module, "Pool", Here)
    exam = {"bank": str(coordinated.material / "held-out.jsonl")}
    spec = coordinated.spec(rounds=2, method=LORA, min_sites=2, evaluation=exam)
    spec = replace(spec, training=replace(spec.training, **{name: parse_one(recipe) for name, recipe in kind.items()}))
    data = request.getfixturevalue("pairs") if "objective" in kind else folder
    sites = tuple(sorted(file.stem for file in data.iterdir()))
    coordinated.have(*sites)
    with coordinated.connect() as session:
        live = session.submit(replace(spec, sites=sites))
        live.result(tmp_path / "live")
        report = live.report
    policy = Policy(bases=("any",), data=(str(data),), **LAX)
    virtual = simulate(replace(spec, sites=sites), data=data, out=tmp_path / "virtual", policy=policy, workers=2)
    files = sorted(path.relative_to(tmp_path / "live") for path in (tmp_path / "live" / "adapter").iterdir())
    assert files and all(
        (tmp_path / "live" / file).read_bytes() == (tmp_path / "virtual" / file).read_bytes() for file in files
    )
    assert virtual.report["overall"] == report["overall"] and virtual.report["sites"] == report["sites"]
    for mine, its in zip(virtual.report["rounds"], report["rounds"], strict=True):
        assert mine["figures"] == its["figures"]
        for site in sites:
            same = ("loss", "losses", "examples", "weight")
            assert [mine["sites"][site][key] for key in same] == [its["sites"][site][key] for key in same]


@pytest.mark.slow
def test_any_number_of_workers_and_a_kill_give_the_same_bytes(material: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(f'bases = ["any"]\ndata = ["{material}"]\nmax_passes = 1e9\nmin_rows = 1\n')
    (tmp_path / "run.toml").write_text(
        f'model = "{material / "model"}"\npublic = "{material / "public.jsonl"}"\nrounds = 3\n'
        'builders = "crash(keep=5)"\ntrainable = "ends(bottom=1,top=1)"\nmethod = "lora(rank=4)"\n'
        "[training]\nsteps = 4\nmax_length = 32\n"
    )

    def start(out: str, workers: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "offsite.client", "simulate", str(tmp_path / "run.toml"), "--sites", "12"]
        command += ["--data", str(material / "bank.jsonl"), "--partition", "iid(rows=16)", "--workers", str(workers)]
        command += ["--policy", str(tmp_path / "policy.toml"), "--out", str(tmp_path / out), "--format", "json"]
        return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True)

    def outcome(process: subprocess.Popen[str], out: str) -> bytes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and json.loads(said.splitlines()[-1])["event"] == "report"
        return (tmp_path / out / "adapter" / "adapter_model.safetensors").read_bytes()

    one = outcome(start("one", 1), "one")
    killed = start("killed", 3)
    blobs = tmp_path / "killed" / "home" / "blobs" / "blake3"
    begun = wait_until(lambda: len(list(blobs.glob("??/*"))), "the emulator is built")
    wait_until(lambda: len(list(blobs.glob("??/*"))) > begun + 3, "a round is over")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert outcome(start("killed", 2), "killed") == one
