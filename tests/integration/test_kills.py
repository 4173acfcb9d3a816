"""A real run, in this process, whose process dies again and again in the course of the journal's writes."""

import itertools
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client import Choice, RunSpec, TrainingSpec
from offsite.coordinator.home import Home
from offsite.coordinator.runs import forking
from offsite.coordinator.store.database import Database
from offsite.coordinator.store.journal import LIVE
from offsite.protos import tensors
from offsite.protos.documents import from_json, to_json
from offsite.protos.security.pki import Authority
from offsite.protos.spec import TaskSpec

from .inline import Site, live


class Killed(BaseException):
    """The end of a process, as far as a test can bring it about: nothing of ours catches it."""


def story(home: Home) -> dict[str, Any]:
    """All that is left of a run but times, and how often a step was begun."""
    journal = home.journal()
    report = json.loads(journal.run("r").report)
    for moving in ("seconds", "spans"):
        del report[moving]
    told: list[Any] = []
    for event in journal.events("r"):
        one = (event.kind, event.round, event.site, event.data)
        if event.kind != "step" or one not in told:
            told.append(one)
    files = [(file.name, file.digest, file.size) for file in journal.artifacts("r")]
    return {"state": journal.run("r").state, "report": report, "events": told, "files": files}


@pytest.mark.slow
def test_a_real_run_that_dies_around_its_writes_ends_with_the_same_bytes_events_and_figures(
    tmp_path: Path, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    kit = Authority.create(tmp_path / "pki").issue("coordinator", "coordinator")
    sites = {"hospital": Site(tmp_path / "hospital", material / "hospital.jsonl")}
    spec = RunSpec(
        model=str(material / "model"),
        builders=(Choice(name="crash", settings={"keep": 5}),),
        trainable=Choice(name="ends", settings={"bottom": 1, "top": 1}),
        method=Choice(name="lora", settings={"rank": 4, "alpha": 8.0}),
        training=TrainingSpec(steps=4, learning_rate=0.01, max_length=32, seed=3),
        public=str(material / "public.jsonl"),
        evaluation={"exam": str(material / "held-out.jsonl")},
        rounds=2,
        evaluate_every=1,
    )

    def submit(name: str) -> Home:
        home = Home(tmp_path / name, kit).prepare()
        home.journal().add_run("r", token="t", owner="olga", spec=to_json(spec))
        home.journal().begin_run("r", ["hospital"])
        return home

    undisturbed, killed = submit("undisturbed"), submit("killed")
    server = forking.fork_server(undisturbed.node)
    server.start()
    with closing(server):
        live(
            undisturbed, sites, partial(forking.perform, 1, undisturbed.node, log={"form": "text", "about": {}})
        )  # its steps in processes of their own
    whole, writes, moments = Database._write, itertools.count(1), itertools.cycle(("before", "after"))

    @contextmanager
    def write(journal: Database) -> Iterator[Any]:
        last = next(writes) == 3  # of this process; a step that was begun again gets past it at the second try
        moment = next(moments) if last else ""
        if moment == "before":
            raise Killed
        with whole(journal) as connection:
            yield connection
        if moment == "after":
            raise Killed

    deaths = 0
    with monkeypatch.context() as dying:
        dying.setattr(Database, "_write", write)
        while killed.journal().run("r").state in LIVE:
            writes = itertools.count(1)
            try:
                live(killed, sites)
            except Killed:
                deaths += 1
    assert deaths > 10 and story(killed)["state"] == "completed"
    assert story(killed) == story(undisturbed)
    for task in undisturbed.journal().tasks("r"):
        broadcast = from_json(TaskSpec, task.spec, where="task").adapter
        went = tensors.distance(*map(undisturbed.blobs().path, (task.update, broadcast)))
        assert task.norm == pytest.approx(went, rel=1e-6) and went > 0
