"""A real run, in this process, whose process dies again and again in the course of the journal's writes."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client import Choice, RunSpec, TrainingSpec
from offsite.client.site.engines.base import EngineSpec
from offsite.client.site.job import TrainerJob
from offsite.client.site.policy import Policy
from offsite.client.site.training import train
from offsite.coordinator.home import Home
from offsite.coordinator.runs import forking
from offsite.coordinator.runs.steps import performing
from offsite.coordinator.runs.supervisor import Supervisor
from offsite.coordinator.service.uploads import Upload
from offsite.coordinator.store.database import Database
from offsite.coordinator.store.journal import LIVE, OPEN
from offsite.protos import fleet_pb2 as pb
from offsite.protos import tensors
from offsite.protos.chunks import digest_file
from offsite.protos.documents import from_json, to_json
from offsite.protos.security.pki import Authority
from offsite.protos.spec import Manifest, TaskSpec


class Killed(BaseException):
    """The end of a process, as far as a test can bring it about: nothing of ours catches it."""


class Site:
    """Trains in this process; a task that comes again, after a kill, has been trained and its update is sent again."""

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder, self._data = folder, data
        folder.mkdir()
        (folder / "secret").write_bytes(bytes(32))

    def work(self, home: Home) -> None:
        journal = home.journal()
        for row in journal.tasks("r"):
            if row.state in OPEN:
                out = self._folder / f"round-{row.round}"
                if not out.exists():
                    self._train(home, from_json(TaskSpec, row.spec, where="task"), out)
                file, key = out / "update.safetensors", pb.TaskKey(run="r", round=row.round, attempt=row.attempt)
                about = {"digest": digest_file(file), "size": file.stat().st_size}
                header = pb.UploadHeader(key=key, metrics=(out / "metrics.json").read_text(), **about)
                upload = Upload(home, journal, home.blobs(), row.site, header)
                kept = upload.begin()
                with closing(upload):
                    upload.write(kept, file.read_bytes()[kept:])
                upload.finish()

    def _train(self, home: Home, task: TaskSpec, out: Path) -> None:
        bundle = self._folder / "bundle"
        listed = from_json(Manifest, home.blobs().path(task.manifest).read_bytes(), where="manifest")
        for entry in listed.files:
            (bundle / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (bundle / entry.path).write_bytes(home.blobs().path(entry.digest).read_bytes())
        job = TrainerJob(
            **{"bundle": str(bundle), "manifest": listed, "adapter": str(home.blobs().path(task.adapter))},
            **{"data": str(self._data), "task": task, "engine": EngineSpec(name="plain", device="cpu")},
            **{"policy": Policy(bases=("any",), data=("/",), suspicious="warn"), "out": str(out)},
            secret=str(self._folder / "secret"),
        )
        train(job, say=lambda event, **fields: None, rendezvous=self._folder / "rendezvous")


def live(home: Home, site: Site, perform: Callable[..., bytes] | None = None) -> None:
    do = perform or partial(performing.perform, home.node)
    Supervisor(home, "r", perform=lambda *job: do(*job[:3]), rest=lambda _: site.work(home)).run()


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
    site = Site(tmp_path / "hospital", material / "hospital.jsonl")
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
            undisturbed, site, partial(forking.perform, 1, undisturbed.node, log={"form": "text", "about": {}})
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
                live(killed, site)
            except Killed:
                deaths += 1
    assert deaths > 10 and story(killed)["state"] == "completed"
    assert story(killed) == story(undisturbed)
    for task in undisturbed.journal().tasks("r"):
        broadcast = from_json(TaskSpec, task.spec, where="task").adapter
        went = tensors.distance(*map(undisturbed.blobs().path, (task.update, broadcast)))
        assert task.norm == pytest.approx(went, rel=1e-6) and went > 0
