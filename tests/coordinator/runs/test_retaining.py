"""What sites of a run are held to: made of the versions of earlier runs, and judged when a run is submitted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.aggregation import Version
from offsite.coordinator.home import Home
from offsite.coordinator.runs import legality
from offsite.coordinator.runs.continuing import ancestor, continued
from offsite.coordinator.runs.continuing import judge as judge_start
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.rounds import task_of
from offsite.coordinator.runs.steps.building import build
from offsite.coordinator.runs.steps.orders import Build
from offsite.coordinator.runs.steps.results import Built, Folded
from offsite.coordinator.runs.steps.storage import store_version
from offsite.coordinator.store.journal import Key
from offsite.protos import tensors
from offsite.protos.documents import to_json, to_plain
from offsite.protos.errors import InputError
from offsite.protos.events import Completed
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Choice, RunSpec, TrainingSpec

WHOLE = Choice(name="whole")
SITES = ("bank", "clinic")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, kit: Path) -> Home:
    return Home(tmp_path_factory.mktemp("retaining") / "home", kit).prepare()


class Stream:
    """Runs that go on from one another, whose rounds nobody trains: each moves the adapter at random."""

    def __init__(self, home: Home, material: Path, *, method: str, strategy: str, retention: str) -> None:
        self._home, self._tasks = home, 0
        self._fields: dict[str, Any] = {
            "model": str(material / "model"),
            "builders": (Choice(name="uniform", settings={"keep": 4}),),
            "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
            "method": parse_one(method),
            "strategy": parse_one(strategy),
        }
        self._training = {"batch_size": 4, "max_length": 16}
        self._retention, self.last = parse_one(retention), ""
        self._name = f"{method}-{strategy}".translate({40: "-", 41: "-", 61: "-"})

    def run(self, scratch: Path) -> tuple[Built, dict[str, torch.Tensor], Grant]:
        """Do the next run; return what was built for it and the adapter that it ends in."""
        journal, last = self._home.journal(), self.last
        training = TrainingSpec(**self._training)
        grant = Grant(**self._fields, training=training)
        if self._tasks:
            training = TrainingSpec(**self._training, retention=self._retention)
            grant = Grant(**self._fields, training=training, start=last, continues=ancestor(journal, last))
            judge_start(journal, self._home.blobs(), grant, tiers=frozenset(), leaves=legality.leaves)
        self._tasks += 1
        order = Build(sites=SITES, continued=continued(journal, grant.continues) if grant.continues else None)
        built = build(self._home.node, grant, order)
        assert build(self._home.node, grant, order).anchors == built.anchors
        (tier,) = built.version.broadcast
        adapter = tensors.load(self._home.blobs().path(built.version.adapter))
        random = torch.Generator().manual_seed(self._tasks)
        adapter = {key: one + 0.1 * torch.randn(one.shape, generator=random) for key, one in adapter.items()}
        state = {name: tensors.load(self._home.blobs().path(one)) for name, one in built.version.state.items()}
        version = store_version(self._home.blobs(), scratch, Version(adapter, {tier: adapter}, state))
        name = f"{self._name}-{self._tasks}"
        journal.add_run(name, token=name, owner="alice", spec=to_json(grant), granted=to_plain(grant))
        journal.add_step(name, "version:0", to_plain(built))
        journal.add_step(name, "version:1", to_plain(Folded(version=version, lineage={})))
        journal.end_run(name, Completed(), report="{}", published={})
        self.last = name
        return built, adapter, grant

    def measure(self, scratch: Path, fisher: Choice) -> tuple[Built, dict[str, torch.Tensor]]:
        """Do a run that measures at the last version; return what was built for it and the sums, of 8 targets."""
        journal, start = self._home.journal(), self.last
        changes = {"method": fisher, "strategy": Choice(name="sum"), "training": TrainingSpec(**self._training)}
        grant = Grant(**self._fields | changes, start=start, continues=ancestor(journal, start))
        assert grant.continues
        judge_start(
            journal,
            self._home.blobs(),
            grant,
            tiers=frozenset(),
            begins=legality.beginning(grant),
            leaves=legality.leaves,
        )
        built = build(self._home.node, grant, Build(sites=SITES, continued=continued(journal, grant.continues)))
        adapter, random = tensors.load(self._home.blobs().path(built.version.adapter)), torch.Generator().manual_seed(7)
        sums = {key: torch.rand(one.shape, generator=random) for key, one in adapter.items() if key.endswith(".fisher")}
        adapter |= sums | {key: torch.full((1,), 8.0).double() for key in adapter if key.endswith(".count")}
        state = {name: tensors.load(self._home.blobs().path(one)) for name, one in built.version.state.items()}
        version = store_version(self._home.blobs(), scratch, Version(adapter, {"r2": adapter}, state))
        self.last = f"{start}-fisher"
        journal.add_run(self.last, token=self.last, owner="alice", spec=to_json(grant), granted=to_plain(grant))
        journal.add_step(self.last, "version:0", to_plain(built))
        journal.add_step(self.last, "version:1", to_plain(Folded(version=version, lineage={})))
        journal.end_run(self.last, Completed(), report="{}", published={})
        return built, {key.removesuffix(".fisher"): one for key, one in sums.items()}


def test_the_mean_of_all_earlier_tasks_is_what_sites_are_sent(home: Home, material: Path, tmp_path: Path) -> None:
    stream = Stream(home, material, method="bottleneck(width=2)", strategy="mean", retention="surgery")
    built, first, _ = stream.run(tmp_path)
    assert built.anchors == {}
    _, second, _ = stream.run(tmp_path)
    third, _, grant = stream.run(tmp_path)
    anchor = tensors.load(home.blobs().path(third.anchors[""].digest))
    assert anchor.keys() == {f"mean.{key}" for key in first}
    for key in first:
        torch.testing.assert_close(anchor[f"mean.{key}"], (first[key] + second[key]) / 2)
    task = task_of(
        Key(stream.last, 0, "bank", 0), grant, History(home.journal(), stream.last), tier="", size=1, previous=None
    )
    assert (task.anchor, task.anchor_size) == (third.anchors[""].digest, third.anchors[""].size)


def test_directions_of_earlier_tasks_are_held_of_products_that_change_their_factors(
    home: Home, material: Path, tmp_path: Path
) -> None:
    stream = Stream(home, material, method="lora(rank=2)", strategy="low-rank", retention="orthogonal")
    _, first, _ = stream.run(tmp_path)
    second, adapter, _ = stream.run(tmp_path)
    third, _, _ = stream.run(tmp_path)
    for built, before, count in ((second, first, 2), (third, adapter, 4)):
        anchor = tensors.load(home.blobs().path(built.anchors["r2"].digest))
        assert all(torch.equal(anchor[f"before.{key}"], one) for key, one in before.items())
        bases = [one for name, one in anchor.items() if name.startswith("basis.")]
        assert bases and all(len(basis) == count for basis in bases)


def test_fisher_information_that_was_not_measured_is_asked_for(home: Home, material: Path, tmp_path: Path) -> None:
    stream = Stream(home, material, method="bottleneck(width=4)", strategy="mean", retention="ewc")
    stream.run(tmp_path)
    with pytest.raises(InputError, match=r"has no fisher, which training.retention ewc needs; run the method fisher"):
        stream.run(tmp_path)


def test_what_was_measured_at_a_version_goes_on_with_its_adapter(home: Home, material: Path, tmp_path: Path) -> None:
    stream = Stream(home, material, method="lora(rank=2)", strategy="factor-mean", retention="ewc")
    _, last, _ = stream.run(tmp_path)
    fisher = Choice(name="fisher", settings={"method": "lora", "settings": {"rank": 2}, "decay": 0.5})
    known: dict[str, torch.Tensor] = {}
    for task in (1, 2):
        sums, measured = stream.measure(tmp_path, fisher)
        begun = tensors.load(home.blobs().path(sums.version.broadcast["r2"].digest))
        assert all(torch.equal(begun[key], one) for key, one in last.items())
        built, new, grant = stream.run(tmp_path)
        known = {key: one / 8 + 0.5 * known.get(key, torch.zeros(())) for key, one in measured.items()}
        anchor = tensors.load(home.blobs().path(built.anchors["r2"].digest))
        for key, one in last.items():
            assert torch.equal(anchor[f"before.{key}"], one)
            torch.testing.assert_close(anchor[f"fisher.{key}"], known[key])
        assert grant.continues and grant.continues.rounds == 2 * task
        last = new


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": ""}, "ewc holds training to the version that a run goes on from, and this one begins anew"),
        (
            {"method": "blocks", "strategy": "mean", "retention": "orthogonal"},
            "orthogonal cannot hold what method blocks",
        ),
        (
            {"strategy": "low-rank"},
            "strategy low-rank writes products in other factors.*strategies factor-mean.*orthog",
        ),
        ({"method": "lora(ranks={bank:2})"}, "compares values one by one, and sites of several tiers have others"),
        ({"method": "moments", "strategy": "sum"}, "cannot hold what method moments trains; use one of: none"),
        ({"retention": "lwf"}, "there is no retention 'lwf'.*it is distil"),
        (
            {"method": "fisher", "strategy": "sum", "retention": "none", "start": ""},
            "measures at a version of the method",
        ),
        ({}, ""),
        ({"retention": "orthogonal", "strategy": "low-rank"}, ""),
        ({"method": "bottleneck", "strategy": "mean", "retention": "surgery(alpha=0.2)"}, ""),
    ],
)
def test_a_run_that_holds_to_nothing_or_cannot_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], words: str
) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    given = {"method": "lora", "strategy": "factor-mean", "retention": "ewc", "start": "run-1"} | changes
    training = TrainingSpec(retention=parse_one(given.pop("retention")))
    start = given.pop("start")
    choices = {name: parse_one(recipe) for name, recipe in given.items()}
    spec = RunSpec(model="nowhere", builders=(WHOLE,), training=training, start=start, **choices)  # type: ignore[arg-type]
    if not words:
        legality.judge(spec)
        return
    with pytest.raises(InputError, match=words):
        legality.judge(spec)
