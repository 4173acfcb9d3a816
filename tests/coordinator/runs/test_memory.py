"""What steps do with a run's memory: what it is given, what is kept of it, and what a run without one forgets."""

import json
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.bundles.stored import store_adapter
from offsite.coordinator.home import Home
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.legality import judge
from offsite.coordinator.runs.shards import in_parts
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.building import build
from offsite.coordinator.runs.steps.evaluation import evaluate
from offsite.coordinator.runs.steps.folding import aggregate
from offsite.coordinator.runs.steps.orders import Aggregate, Build, Continued, Evaluate, Publish, Update
from offsite.coordinator.runs.steps.performing import perform
from offsite.coordinator.runs.steps.publishing import publish
from offsite.coordinator.runs.steps.results import Built, Evaluation
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.supervisor import Lost, Supervisor
from offsite.coordinator.runs.versions import Version, read_schema
from offsite.coordinator.store.journal import LIVE, OPEN, Key
from offsite.emulator import modality, zoo
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.modality import encode, read
from offsite.emulator.plug import load
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos import tensors
from offsite.protos.documents import from_json, to_json, to_plain
from offsite.protos.errors import InputError
from offsite.protos.events import StepLost
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Ancestor, Choice, RunSpec, TaskSpec, TrainingSpec, UpdateMetrics

SCHEMA: Schema = {"0.norm": Field("F32", (3,), Rule.MEAN)}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node", f"file://{tmp_path}/blobs").prepare()


@pytest.fixture
def last(node: Node, tmp_path: Path) -> Version:
    """A version with what a strategy has kept, and a memory."""
    adapter = {"0.norm": torch.arange(3.0)}
    state = {"residual.": {"0.norm": torch.ones(3)}, "memory.old": {"0.norm": torch.zeros(3)}}
    return store_version(node.blobs(), tmp_path, aggregation.Version(adapter, {"": adapter}, state))


def test_a_strategy_is_given_what_strategies_keep(last: Version) -> None:
    assert last.bare.state == {"residual.": last.state["residual."]} and last.bare.broadcast == last.broadcast


def test_a_run_without_a_memory_forgets_that_of_the_run_it_goes_on_from_and_nothing_else(
    node: Node, last: Version, tmp_path: Path
) -> None:
    begun = memory.begin(node.blobs(), tmp_path, Grant(model="m"), last, last, SCHEMA)
    assert begun == last.bare != last
    new = load_version(node.blobs(), begun)
    assert memory.after(node.blobs(), Grant(model="m"), begun, new, SCHEMA, number=0) is new


# two tasks, by the steps of real runs

SITES = ("bank", "clinic")


def fields(material: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "model": str(material / "model"),
        "builders": (Choice(name="uniform", settings={"keep": 4}),),
        "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
        "method": Choice(name="lora", settings={"rank": 2}),
        "training": TrainingSpec(steps=5, max_length=16),
        "evaluation": {"exam": str(material / "train.jsonl"), "other": str(material / "train.jsonl")},
        "memory": Choice(name="lae"),
    }
    return given | changes


def rounds(node: Node, grant: Grant, built: Built, scratch: Path) -> list[Version]:
    """The rounds of a run whose sites move their adapters at random, and the version that it began from."""
    versions = [built.version]
    for number in range(grant.rounds_before, grant.rounds_before + grant.rounds):
        order = ordered(node, grant, built, versions[-1], number, scratch)
        versions.append(aggregate(node, grant, order).version)
    return versions


def ordered(node: Node, grant: Grant, built: Built, last: Version, number: int, scratch: Path) -> Aggregate:
    """A round's updates, to be folded."""
    start, updates = tensors.load(node.blobs().path(last.broadcast["r2"].digest)), []
    for at, site in enumerate(SITES):
        stored = store_adapter(node.blobs(), scratch / "update", moved(start, seed=10 * number + at))
        updates.append(Update(site=site, digest=stored.digest, examples=at + 1))
    return Aggregate(last=last, schema=built.schema, tiers=built.tiers, updates=tuple(updates), round=number)


def moved(start: Tensors, *, seed: int) -> Tensors:
    """What sites make of their start at random, or of sums if it has some."""
    draw = torch.Generator().manual_seed(seed)
    moving = [key for key in start if "fisher" in key] or [*start]
    return start | {key: start[key] + 0.3 * torch.randn(start[key].shape, generator=draw).abs() for key in moving}


def test_a_second_task_is_measured_and_published_by_both_of_its_adapters(
    node: Node, material: Path, tmp_path: Path
) -> None:
    first = Grant(**fields(material), rounds=1, task="one")
    built = build(node, first, Build(sites=SITES))
    end = rounds(node, first, built, tmp_path)[-1]
    assert end.memory == {}
    second = Grant(**fields(material), rounds=2, task="two", continues=Ancestor(run="first", round=1, rounds=1))
    origin = Continued(version=end, base=built.base.digest, trainable=built.bundle.trainable, recovery=built.recovery)
    again = build(node, second, Build(sites=SITES, continued=origin))
    assert again.version.memory == {"memory.offline": end.adapter} and again.version.bare == replace(end, figures={})
    last = rounds(node, second, again, tmp_path)[-1]
    versions = [load_version(node.blobs(), one) for one in (end, last)]
    offline = versions[1].state["memory.offline"]
    share, key = 1 - (1 - 2 / 10) ** 5, "0.self_attn.q_proj"
    middle = load_version(node.blobs(), rounds(node, replace(second, rounds=1), again, tmp_path)[1])

    def matrix(adapter: Any) -> torch.Tensor:
        return adapter[f"{key}.B"].double() @ adapter[f"{key}.A"].double()

    chain = [matrix(one) for one in (versions[0].adapter, middle.adapter, versions[1].adapter)]
    expected = (1 - share) * ((1 - share) * chain[0] + share * chain[1]) + share * chain[2]
    torch.testing.assert_close(matrix(offline), expected, rtol=1e-5, atol=1e-6)

    ask = {"base": built.base.digest, "recovery": built.recovery, "memory": last.memory}
    measured = evaluate(node, second, Evaluate(**ask, manifest=None, adapter=last.adapter))
    for name, digest in (("online", last.adapter), ("offline", last.memory["memory.offline"])):
        alone = evaluate(node, second, Evaluate(**ask | {"memory": {}}, manifest=None, adapter=digest))
        assert measured.experts[name] == alone.sets and alone.experts == {}
        assert alone.sets.keys() == {"exam", "other"} and alone.sets != measured.sets
    order = Evaluate(**ask, manifest=None, adapter=last.adapter)

    def do(orders: Any) -> list[bytes]:
        return [to_json(evaluate(node, second, one)) for one in orders]

    parts = from_json(Evaluation, in_parts(order, second, 2, do), where="evaluation")
    assert (parts.sets, parts.experts) == (measured.sets, measured.experts), "and so it is on two nodes"

    files = publish(node, second, Publish(**ask, adapter=last.adapter)).artifacts
    assert {"adapter/adapter_config.json", "experts/offline/adapter_config.json", "ensemble.json"} <= files.keys()
    for name, stored in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(node.blobs().path(stored.digest).read_bytes())
    base, tokenizer = zoo.load_base(material / "model", dtype=torch.float32)
    batches = evaluation_batches(encode(read(material / "train.jsonl"), tokenizer, max_length=16), batch_size=8)
    score = modality.score(load(base, tmp_path / "out"), batches)
    assert score.total == pytest.approx(measured.sets["exam"].nll, rel=1e-5)


def test_what_serves_alone_is_published_as_any_adapter(node: Node, material: Path, tmp_path: Path) -> None:
    grant = Grant(
        **fields(material, memory=Choice(name="lae", settings={"serve": "offline"})),
        continues=Ancestor(run="first", round=1, rounds=1),
    )
    built = build(node, replace(grant, continues=None), Build(sites=SITES))
    origin = Continued(
        version=built.version, base=built.base.digest, trainable=built.bundle.trainable, recovery=built.recovery
    )
    last = rounds(node, grant, build(node, grant, Build(sites=SITES, continued=origin)), tmp_path)[-1]
    ask: dict[str, Any] = {"base": built.base.digest, "recovery": built.recovery, "adapter": last.adapter}
    served = publish(node, grant, Publish(**ask, memory=last.memory)).artifacts
    plain = publish(node, grant, Publish(**ask | {"adapter": last.memory["memory.offline"]})).artifacts
    assert served == plain and not any(name.startswith(("experts/", "ensemble")) for name in served)
    assert evaluate(node, grant, Evaluate(**ask, manifest=None, memory=last.memory)).experts == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": "lea"}, "there is no memory 'lea' .did you mean lae"),
        ({"memory": "lae", "merge": True}, "merge: memory lae as it is set answers by several adapters"),
        (
            {"memory": "lae", "method": "spiel", "strategy": "index-union"},
            "memory lae cannot accumulate .* one of: grown, none",
        ),
        (
            {"memory": "ema", "strategy": "factor-mean"},
            "ema has sites go on .* factor-mean would .* memories: grown, lae, none",
        ),
        ({"memory": 'lae(serve="offline")', "merge": True}, ""),
        ({"memory": "ema"}, ""),
        ({"memory": "grown"}, "memory grown keeps what each task has learned; name this run's, .*hospital"),
        ({"memory": "grown", "task": "hospital"}, ""),
        (
            {"memory": "grown", "task": "hospital", "method": "fisher", "strategy": "sum", "start": "run-1"},
            "grown has nothing to accumulate in a run of fisher, .* hands on .* use memory none",
        ),
        (
            {"memory": "shard-store", "task": "hospital", "method": "mos(private=0)", "strategy": "mean"},
            "shard-store keeps by task what is private, and method mos as it is set .* use mhr or mos, .*: ema,",
        ),
        ({"memory": "shard-store", "task": "hospital", "method": "mos", "strategy": "mean"}, ""),
    ],
)
def test_a_run_is_refused_that_asks_of_its_memory_what_that_cannot(
    material: Path, changes: dict[str, Any], words: str
) -> None:
    given = {name: parse_one(one) if name in ("memory", "strategy", "method") else one for name, one in changes.items()}
    spec = RunSpec(**fields(material, **given))
    with pytest.raises(InputError, match=words) if words else nullcontext():
        judge(spec)


def test_sites_start_a_new_task_from_the_shards_that_the_memory_gives_them(
    node: Node, material: Path, tmp_path: Path
) -> None:
    mos = Choice(name="mos", settings={"modules": ["down_proj"]})
    memories, mean = Choice(name="shard-store", settings={"c": 0.0}), Choice(name="mean")
    given = fields(material, method=mos, strategy=mean, memory=memories)
    first = Grant(**given, rounds=1, task="one")
    built = build(node, first, Build(sites=SITES))
    moved = {
        key: one + 0.1 if one.is_floating_point() else one
        for key, one in tensors.load(node.blobs().path(built.version.adapter)).items()
    }
    update = Update(site=SITES[0], digest=store_adapter(node.blobs(), tmp_path / "u", moved).digest, examples=1)
    tiers = {SITES[0]: ""}
    order = Aggregate(last=built.version, schema=built.schema, tiers=tiers, updates=(update,), round=0)
    end = aggregate(node, first, order).version
    second = Grant(**given, rounds=1, task="two", continues=Ancestor(run="first", round=1, rounds=1))
    origin = Continued(version=end, base=built.base.digest, trainable=built.bundle.trainable, recovery=built.recovery)
    begun = build(node, second, Build(sites=SITES, continued=origin)).version
    assert begun.broadcast[""].digest == begun.adapter != end.adapter and [*begun.state] == ["memory.task.one"]
    schema = read_schema(node.blobs(), built.schema)
    start, last, new = (load_version(node.blobs(), one).adapter for one in (built.version, end, begun))
    for key, field in schema.items():
        if field.private:
            assert torch.equal(new[key][-field.private :], start[key][-field.private :])
            assert torch.equal(new[key][: -field.private], last[key][: -field.private])
    assert sum(field.private > 0 for field in schema.values()) == 2
    after = aggregate(node, second, replace(order, last=begun, round=1)).version
    kept = load_version(node.blobs(), after)
    for key, field in schema.items():
        common = slice(None, -field.private or None)
        assert torch.equal(kept.adapter[key][common], last[key][common]), "c = 0 freezes them"
    assert after.broadcast[""].digest == after.adapter


def test_of_a_memory_by_task_each_set_is_measured_by_the_adapter_of_its_name(
    node: Node, material: Path, tmp_path: Path
) -> None:
    sets = dict.fromkeys(("one", "two", "other"), str(material / "train.jsonl"))
    given = fields(material, evaluation=sets, memory=Choice(name="grown"))
    first = Grant(**given, rounds=1, task="one")
    built = build(node, first, Build(sites=SITES))
    end = rounds(node, first, built, tmp_path)[-1]
    second = Grant(**given, rounds=1, task="two", continues=Ancestor(run="first", round=1, rounds=1))
    origin = Continued(version=end, base=built.base.digest, trainable=built.bundle.trainable, recovery=built.recovery)
    again = build(node, second, Build(sites=SITES, continued=origin))
    assert again.version.adapter == built.version.adapter and again.version.broadcast == built.version.broadcast
    last = rounds(node, second, again, tmp_path)[-1]
    ask = {"base": built.base.digest, "recovery": built.recovery, "manifest": None}
    measured = evaluate(node, second, Evaluate(**ask, adapter=last.adapter, memory=last.memory))
    plain = replace(first, memory=Choice(name="none"))
    for names, digest in ((("one",), end.adapter), (("two", "other"), last.adapter)):
        alone = evaluate(node, plain, Evaluate(**ask, adapter=digest))
        assert {name: measured.sets[name] for name in names} == {name: alone.sets[name] for name in names}
    assert measured.sets["one"] != measured.sets["two"]
    files = publish(
        node, second, Publish(base=built.base.digest, recovery=None, adapter=last.adapter, memory=last.memory)
    )
    assert {"adapter/adapter_config.json", "experts/one/adapter_config.json"} <= files.artifacts.keys()


def test_what_a_memory_keeps_goes_on_through_a_run_that_measures(node: Node, material: Path, tmp_path: Path) -> None:
    lora = Grant(**fields(material, strategy=Choice(name="factor-mean")), rounds=1)
    built = build(node, lora, Build(sites=SITES))

    def begun(grant: Grant, version: Version, method: Choice) -> Built:
        own = {"base": built.base.digest, "trainable": built.bundle.trainable, "recovery": built.recovery}
        return build(node, grant, Build(sites=SITES, continued=Continued(version=version, method=method, **own)))

    end = rounds(node, lora, built, tmp_path)[-1]
    second = replace(lora, continues=Ancestor(run="first", round=1, rounds=1))
    last = rounds(node, second, begun(second, end, lora.method), tmp_path)[-1]
    fisher = Choice(name="fisher", settings={"settings": {"rank": 2}})
    given = fields(material, method=fisher, strategy=Choice(name="sum"), memory=Choice(name="none"))
    measuring = Grant(**given, rounds=1, continues=Ancestor(run="second", round=1, rounds=2))
    sums = begun(measuring, last, lora.method)
    measured = rounds(node, measuring, sums, tmp_path)[-1]
    assert sums.version.memory == measured.memory == last.memory != {}
    third = replace(lora, continues=Ancestor(run="sums", round=1, rounds=3))
    on, plain = begun(third, measured, fisher).version, begun(third, last, lora.method).version
    assert on.state.keys() - plain.state.keys() == {"retention.fisher"}
    assert replace(on, state=plain.state) == plain and on.memory == plain.memory


SECOND = ("build", *2 * ["aggregate"], *4 * ["evaluate"], "publish")  # the steps of a run of two rounds


class Sites:
    """Stands for what does the steps of a run, really, and for its sites; of each step the first result is lost."""

    def __init__(self, home: Home, *, losing: bool) -> None:
        self._home, self._losing = home, losing
        self._begun: set[str] = set()

    def perform(self, step: str, spec: bytes, order: bytes, _: object) -> bytes:
        result = perform(self._home.node, step, spec, order)
        asked = json.loads(order)
        for update in asked.get("updates", ()):
            update.pop("stamp")  # when it was last checked
        key = f"{step} {asked}"
        if self._losing and key not in self._begun:
            self._begun.add(key)
            raise Lost("its process was killed")
        return result

    def rest(self, _: float) -> None:
        journal = self._home.journal()
        for row in journal.tasks("second"):
            if row.state in OPEN:
                task = from_json(TaskSpec, row.spec, where="task")
                start = tensors.load(self._home.blobs().path(task.adapter))
                sent = moved(start, seed=10 * task.round + SITES.index(task.site))
                stored = store_adapter(self._home.blobs(), self._home.node.scratch / "update", sent)
                metrics = to_json(UpdateMetrics(examples=3, tokens=1, loss=1.0, engine="plain")).decode()
                values = {"state": "uploaded", "update": stored.digest, "norm": 1.0, "metrics": metrics}
                journal.set_task(Key(row.run, row.round, row.site, row.attempt), None, **values)
        journal.close()


@pytest.mark.slow
def test_a_second_task_whose_supervisor_is_lost_after_every_step_ends_with_the_same_bytes(
    material: Path, tmp_path: Path, kit: Path
) -> None:
    ends = []
    for losing in (False, True):
        home = Home(tmp_path / str(losing), kit).prepare()
        journal, first = home.journal(), Grant(**fields(material), rounds=1)
        built = build(home.node, first, Build(sites=SITES))
        done = aggregate(home.node, first, ordered(home.node, first, built, built.version, 0, tmp_path))
        journal.add_run("first", token="first", owner="alice", spec=to_json(first), granted=to_plain(first))
        for number, result in enumerate((built, done)):
            journal.add_step("first", f"version:{number}", to_plain(result))
        spec = RunSpec(**fields(material), rounds=2, sites=SITES, start="first:1")
        second = Grant(**vars(spec), continues=Ancestor(run="first", round=1, rounds=1))
        journal.add_run("second", token="second", owner="alice", spec=to_json(spec), granted=to_plain(second))
        journal.begin_run("second", list(SITES))
        sites = Sites(home, losing=losing)
        while journal.run("second").state in LIVE:
            with suppress(Lost):
                Supervisor(home, "second", perform=sites.perform, rest=sites.rest).run()
        run = journal.run("second")
        assert run.state == "completed", run.error
        versions = [without_spans(value) for name, value in journal.steps("second").items() if "version:" in name]
        report = json.loads(run.report)
        files = {file.name: file.digest for file in journal.artifacts("second")}
        ends.append((versions, {key: report[key] for key in ("overall", "sites", "experts", "rounds")}, files))
        assert len(list(journal.events("second", kind=StepLost.kind))) == (len(SECOND) if losing else 0)
        assert report["experts"].keys() == {"online", "offline"} and "ensemble.json" in files
        assert all("memory.offline" in one["version"]["state"] for one in versions)
        journal.close()
    assert ends[0] == ends[1]


def without_spans(value: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in value.items() if name != "spans"}
