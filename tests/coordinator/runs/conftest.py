"""A run whose steps and sites a test stands for: all in one thread, without a tensor, a process or a pause."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.bundles.manifests import describe
from offsite.coordinator.home import Home
from offsite.coordinator.runs.needs import Needs
from offsite.coordinator.runs.steps.orders import Aggregate, Attack, Build, Compare, Evaluate, Publish, Realign, Tune
from offsite.coordinator.runs.steps.results import (
    Attacked,
    Attacks,
    Built,
    Compared,
    Evaluation,
    Folded,
    LatePart,
    Part,
    Publication,
    Realigned,
)
from offsite.coordinator.runs.supervisor import Supervisor
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.journal import OPEN, Key, Row
from offsite.emulator.evaluation.portion import Portion
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import from_json, to_json
from offsite.protos.events import Examined, SiteState, UpdateAccepted
from offsite.protos.exams import Exam
from offsite.protos.figures import Score
from offsite.protos.security.pki import Authority
from offsite.protos.spec import BaseRef, Choice, Manifest, RunSpec, Span, TaskSpec, UpdateMetrics

BASE = BaseRef(name="m", digest=digest_bytes(b"base"), layers=3, parameters=9)
MANIFEST = Manifest(
    **{"base": BASE, "builders": (Choice(name="any"),), "layers": (0, 2), "trainable": (0,), "files": ()},
    **{"parameters": 6, "verbatim": 6, "lossy": 0},
)
SPANS = (Span(kind="evaluation", start=1.0, end=2.0),)


def stored(content: bytes) -> Stored:
    return Stored(digest=digest_bytes(content), size=len(content))


def version(content: bytes) -> Version:
    sent = stored(content)
    return Version(adapter=sent.digest, broadcast={"r8": sent}, figures={"residual": 0.0})


class Stand:
    """Does the steps of one run and the work of its sites; equal orders give equal results.

    `act` is what a site does with an open task, `done` every order in turn. To be changed by a test.
    """

    def __init__(self, home: Home) -> None:
        self.home, self.journal = home, home.journal()
        self.act: Callable[[Row], None] = self.upload
        self.done: list[Any] = []
        self.losses: dict[tuple[str, int], float] = {}  # site, version -> nats of its held-out tokens, if it tells

    def submit(self, *sites: str, **fields: Any) -> None:
        """Add a run, and select its sites if they are named."""
        self.journal.add_run("r", token="t", owner="alice", spec=to_json(RunSpec(model="m", **fields)))
        if sites:
            self.journal.begin_run("r", list(sites))

    def run(self) -> Row:
        """Have a supervisor take the run as far as it goes; return the run."""
        Supervisor(self.home, "r", perform=self.perform, rest=self.rest).run()
        return self.journal.run("r")

    def rest(self, _: float) -> None:
        for task in self.journal.tasks("r"):
            if task.state in OPEN:
                self.act(task)

    def upload(self, task: Row, *, keep: bool = True) -> None:
        """Accept an update of a task, with a file behind it or without; of an exam, what it gives."""
        if version := from_json(TaskSpec, task.spec, where="task").examines:
            told = self.exam(task.site, version)
            event = Examined(round=version, site=task.site, exam=told)
            self.journal.set_task(key(task), event, state="measured", metrics=to_json(told).decode())
            return
        content = f"update {task.round} {task.site}".encode()
        if keep:
            file = self.home.node.scratch / "update"
            file.write_bytes(content)
            self.home.blobs().take(file)
        exam = self.exam(task.site, task.round) if (task.site, task.round) in self.losses else None
        metrics = UpdateMetrics(examples=3, tokens=1, loss=1.0, engine="plain", exam=exam)
        values = {"state": "uploaded", "update": digest_bytes(content), "norm": 0.5, "moved_at": time.time()}
        values |= {"metrics": to_json(metrics).decode()}
        accepted = UpdateAccepted(round=task.round + 1, site=task.site, loss=1.0, bytes=len(content), examples=3)
        self.journal.set_task(key(task), accepted, **values, bytes_up=len(content))

    def exam(self, site: str, version: int) -> Exam:
        """What a site tells of its held-out rows, of 100 tokens."""
        before = self.losses[site, version]
        return Exam(rows=10, before=Score(nll=before, tokens=100), after=Score(nll=before / 2, tokens=100))

    def close(self, task: Row, state: str = "failed", message: str = "no memory") -> None:
        """Close a task without an update."""
        self.journal.close_task(key(task), state, message)

    def move(self, task: Row, state: str = "training", **values: Any) -> None:
        """Have a site say how far it is with a task, and the journal tell it."""
        event = SiteState(round=task.round + 1, site=task.site, state=state, **values)
        self.journal.set_task(key(task), event, state=state, moved_at=time.time(), **values)

    def perform(self, step: str, spec: bytes, order: bytes, _: Needs) -> bytes:
        return to_json(getattr(self, f"_{step}")(order))

    def _take(self, kind: type[Any], order: bytes) -> Any:
        self.done.append(from_json(kind, order, where="order"))
        return self.done[-1]

    def _build(self, order: bytes) -> Built:
        sites = self._take(Build, order).sites
        return Built(
            **{"manifest": digest_bytes(b"manifest"), "manifest_size": 8, "bundle": describe(MANIFEST), "base": BASE},
            **{"method_hash": digest_bytes(b"method"), "learning_rate": 0.01, "computed": "fp32", "recovery": None},
            **{"version": version(b"start"), "tiers": dict.fromkeys(sites, "r8"), "schema": digest_bytes(b"schema")},
            **{"method": Choice(name="lora", settings={"rank": 4}), "spans": SPANS, "update_sizes": {"r8": 8}},
            portions={"0": Portion(3, 0, 3, ""), "1": Portion(0, 0, 3, ""), "2": Portion(3, 0, 3, "")},
        )

    def _aggregate(self, order: bytes) -> Folded:
        asked = self._take(Aggregate, order)
        known = replace(asked, updates=tuple(replace(update, stamp=None) for update in asked.updates))
        return Folded(
            version=version(to_json(known)),
            lineage={
                one.site: Part(update=one.digest, weight=1 / len(asked.updates)) for one in asked.updates if not one.age
            },
            late={
                one.site: LatePart(update=one.digest, weight=1 / len(asked.updates), age=one.age)
                for one in asked.updates
                if one.age
            },
            spans=SPANS,
        )

    def _compare(self, order: bytes) -> Compared:
        asked = self._take(Compare, order)
        return Compared(cosines=dict.fromkeys((one.site for one in asked.folded.updates), 0.5), spans=SPANS)

    def _realign(self, order: bytes) -> Realigned:
        self._take(Realign, order)
        return Realigned(manifest=digest_bytes(order), manifest_size=8, bundle=describe(MANIFEST), spans=SPANS)

    def _evaluate(self, order: bytes) -> Evaluation:
        asked = self._take(Evaluate, order)
        bad = asked.manifest is not None and asked.adapter is None  # an emulator that nothing was trained on
        nll = (8000.0 if bad else 1000.0) + int(digest_bytes(order)[7:9], 16)
        return Evaluation(sets={"exam": Score(nll=nll, tokens=1000)}, spans=SPANS)

    def _tune(self, order: bytes) -> Evaluation:
        self._take(Tune, order)
        return Evaluation(sets={"exam": Score(nll=500.0, tokens=1000)}, spans=SPANS)

    def _attack(self, order: bytes) -> Attacks:
        self._take(Attack, order)
        made = Attacked(name="unfreeze 2", sets={"exam": Score(nll=3000.0, tokens=1000)})
        return Attacks(attacks=(made,), spans=SPANS)

    def _publish(self, order: bytes) -> Publication:
        self._take(Publish, order)
        return Publication(artifacts={"adapter/model": stored(order)}, spans=SPANS)


def key(task: Row) -> Key:
    return Key(task.run, task.round, task.site, task.attempt)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator's kit."""
    return Authority.create(tmp_path_factory.mktemp("kit") / "pki").issue("coordinator", "coordinator")


@pytest.fixture
def stand(tmp_path: Path, kit: Path) -> Stand:
    """A stand over an empty home."""
    return Stand(Home(tmp_path / "home", kit).prepare())
