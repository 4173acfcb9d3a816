"""Runs whose rounds train a part of the adapter: what tasks say, what is let in, and what becomes of the rest."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.node import Node
from offsite.coordinator.runs import legality
from offsite.coordinator.runs.partial import UpdateSizes, schema_of, turn_of
from offsite.coordinator.runs.steps.folding import aggregate
from offsite.coordinator.runs.steps.orders import Aggregate, Update
from offsite.coordinator.runs.steps.storage import store_schema
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.emulator import parts
from offsite.emulator.parts import Turn
from offsite.kernels.schema import Field, Rule, Schema, Tensors, only, size_bytes
from offsite.protos import tensors, upload
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import InputError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Choice, LocalTraining, RunSpec, TaskSpec, TrainingSpec
from offsite.protos.upload.admission import admit
from offsite.protos.upload.change import Change

WHOLE = Choice(name="whole")
LAYERS = range(6)
SCHEMA: Schema = {
    **{f"{at}.{name}": Field("F32", (4, 3 + at), Rule.MEAN) for at in LAYERS for name in ("q", "v")},
    **{f"{at}.norm": Field("F32", (5,), Rule.MEAN) for at in LAYERS},
}
SITES = ("bank", "clinic", "ward")


def adapter(seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {key: torch.randn([size or 0 for size in field.shape], generator=draw) for key, field in SCHEMA.items()}


def training(part: str) -> TrainingSpec:
    return TrainingSpec(part=parse_one(part), seed=3, steps=4)


def names(part: str, site: str, number: int, chosen: tuple[int, ...] = ()) -> frozenset[str]:
    choice = parse_one(part)
    return parts.make(choice.name, choice.settings).groups(SCHEMA, Turn(3, number, site), chosen)


# what tasks say


def sent(stand: Any, part: str, *, chosen: tuple[int, ...] = (), **fields: Any) -> tuple[list[TaskSpec], list[Any]]:
    """Run a run of two rounds whose build has stored a schema; return its tasks and how its rounds were folded."""
    build = stand._build

    def built(order: bytes) -> Any:
        digest = store_schema(stand.home.blobs(), stand.home.node.scratch, SCHEMA)
        return replace(build(order), schemas={"r8": digest}, update_sizes={"r8": size_bytes(SCHEMA)})

    stand._build = built
    stand.submit("bank", "ward", rounds=2, training=training(part), **fields)
    assert stand.run().state == "completed"
    tasks = [from_json(TaskSpec, task.spec, where="task") for task in stand.journal.tasks("r")]
    return tasks, [order for order in stand.done if isinstance(order, Aggregate)]


@pytest.mark.parametrize("part", ["lisa(layers=2)", 'lisa(layers=1,per="site")', "half"])
def test_a_task_says_what_trains_and_how_large_that_is(stand: Any, part: str) -> None:
    tasks, folds = sent(stand, part)
    assert [order.round for order in folds] == [0, 1] and len(tasks) == 4
    for task in tasks:
        assert task.training.part == parse_one(part)
        expected = only(SCHEMA, names(part, task.site, task.round))
        assert schema_of(task, SCHEMA) == expected and task.update_size == size_bytes(expected) < size_bytes(SCHEMA)
        assert turn_of(task) == Turn(3, task.round, task.site)


def test_a_site_is_told_what_it_carries_itself_and_trains_that(stand: Any) -> None:
    part = 'by-capability(shards=3,carries=3,sites={"bank":1,"ballot":1,"ward":2})'
    tasks, _ = sent(stand, part)
    told = {task.site: task.training.part.settings for task in tasks}
    common = {"shards": 3, "step": 1}
    assert told == {"bank": {**common, "carries": 1, "first": 1}, "ward": {**common, "carries": 2, "first": 2}}
    for task in tasks:
        expected = only(SCHEMA, names(part, task.site, task.round))
        assert schema_of(task, SCHEMA) == expected and task.update_size == size_bytes(expected)
    rounds = {number: [task for task in tasks if task.round == number] for number in (0, 1)}
    assert {len(schema_of(task, SCHEMA)) for task in rounds[0]} == {len(SCHEMA) // 3, 2 * len(SCHEMA) // 3}


def test_where_sites_choose_a_task_allows_for_the_largest_layers(stand: Any) -> None:
    tasks, _ = sent(stand, "ist(share=0.34)")
    assert {task.update_size for task in tasks} == {size_bytes(only(SCHEMA, names("ist(share=0.34)", "", 0, (4, 5))))}


def test_a_run_that_trains_all_reads_no_schema(stand: Any) -> None:
    stand.submit("ward")
    assert stand.run().state == "completed"
    (task,) = stand.journal.tasks("r")
    assert from_json(TaskSpec, task.spec, where="task").update_size == 8


def test_rounds_before_a_run_that_goes_on_count(stand: Any) -> None:
    spec: Any = SimpleNamespace(training=training("lisa(layers=1)"), upload=(), rounds_before=7)
    built: Any = SimpleNamespace(schemas={"": store_schema(stand.home.blobs(), stand.home.node.scratch, SCHEMA)})
    sizes = UpdateSizes(stand.home.blobs, spec, built)
    for number in range(3):
        layer = only(SCHEMA, names("lisa(layers=1)", "ward", 7 + number))
        assert sizes.of("", number, "ward") == size_bytes(layer)


# what is let in


@pytest.fixture
def task() -> TaskSpec:
    digest = "sha256:" + "0" * 64
    digests = dict.fromkeys(("base", "manifest", "adapter", "method_hash"), digest)
    counts = dict.fromkeys(("manifest_size", "adapter_size", "update_size"), 1)
    rules = {**vars(training("lisa(layers=2)")), "learning_rate": 1e-3}
    return TaskSpec(
        **{"run": "r", "round": 0, "rounds": 1, "site": "ward", "attempt": 0, "method": Choice(name="blocks")},
        **digests,
        **counts,
        training=LocalTraining(**rules),
    )


def test_an_update_is_let_in_if_it_has_what_was_drawn_and_no_more_or_less(task: TaskSpec, tmp_path: Path) -> None:
    start, moved = adapter(0), {key: tensor + 0.5 for key, tensor in adapter(0).items()}
    tensors.save(tmp_path / "broadcast", start)
    own = schema_of(task, SCHEMA)
    about = {"offsite": f'{{"broadcast": "{task.adapter}", "method_hash": "{task.method_hash}"}}'}
    update = tmp_path / "update"

    def judged(keys: Any) -> float:
        tensors.save(update, {key: moved[key] for key in keys}, metadata=about)
        return admit(update, task, own, broadcast=tmp_path / "broadcast", max_norm=100.0)

    expected = sum(0.25 * moved[key].numel() for key in own) ** 0.5
    assert judged(own) == pytest.approx(expected, rel=1e-6)
    other = min(SCHEMA.keys() - own.keys())
    with pytest.raises(Exception, match=f"tensor {other} was not asked for"):
        judged([*own, other])
    with pytest.raises(Exception, match=f"tensor {min(own)} is missing"):
        judged(own.keys() - {min(own)})


def test_how_far_a_part_went_is_summed_up_as_it_comes(task: TaskSpec, tmp_path: Path) -> None:
    start, own = adapter(0), schema_of(task, SCHEMA)
    tensors.save(tmp_path / "broadcast", start)
    tensors.save(tmp_path / "update", {key: start[key] * 1.5 + 0.25 for key in own})
    data, change = (tmp_path / "update").read_bytes(), Change(tmp_path / "broadcast", own)
    for at in range(0, len(data), 4096):
        change.add(data[at : at + 4096])
    change.close()
    there = tensors.distance(tmp_path / "update", tmp_path / "broadcast")
    assert change.norm(tmp_path / "update") == pytest.approx(there, rel=1e-7)
    tensors.save(tmp_path / "other", start)
    assert change.norm(tmp_path / "other") is None, "it has more than was drawn"


# how a round is folded


class Round:
    """The updates of three sites, as a part has them, and a node that folds them."""

    def __init__(self, folder: Path, part: str, *, stages: str = "", chosen: Any = None) -> None:
        self._folder, self.chosen = folder, chosen or {}
        self.node = Node(folder / "node", f"file://{folder}/blobs").prepare()
        self.blobs = self.node.blobs()
        chain = (parse_one(stages),) if stages else ()
        self.spec = RunSpec(model="m", strategy=Choice(name="mean"), training=training(part), upload=chain)
        self.last, self.has = adapter(0), {s: names(part, s, 5, self.chosen.get(s, ())) for s in SITES}
        start, made = self._store(self.last), upload.make(chain)
        updates = []
        for seed, site in enumerate(SITES, 1):
            own = only(SCHEMA, self.has[site])
            packed: Tensors = {}
            for piece in upload.pack(made, {key: adapter(seed)[key] for key in own}, self.last, own, key=bytes(32)):
                packed |= piece.update
            self.packed = packed
            made_of = {"digest": self._store(packed).digest, "examples": seed, "chosen": self.chosen.get(site, ())}
            updates.append(Update(site=site, norm=None, **made_of))
        (folder / "schema").write_bytes(to_json(SCHEMA))
        self.order = Aggregate(
            last=Version(adapter=start.digest, broadcast={"": start}),
            schema=self.blobs.take(folder / "schema")[0],
            tiers=dict.fromkeys(SITES, ""),
            updates=tuple(updates),
            round=5,
            groups=len(SCHEMA),
        )

    def _store(self, adapter: Tensors) -> Stored:
        tensors.save(self._folder / "file", adapter)
        digest, size = self.blobs.take(self._folder / "file")
        return Stored(digest=digest, size=size)

    def expected(self) -> Tensors:
        """What the mean over those who trained a group makes of it."""
        made = dict(self.last)
        for key in SCHEMA:
            owners = [(seed, adapter(seed)[key]) for seed, site in enumerate(SITES, 1) if key in self.has[site]]
            if owners:
                made[key] = sum(seed * one for seed, one in owners) / sum(seed for seed, _ in owners)
        return made


SOME = 'by-capability(shards=5,sites={"bank":1,"clinic":3})'  # the ward, not named, trains what the bank does


@pytest.mark.parametrize("part", ["lisa(layers=2)", 'lisa(layers=2,per="site")', 'half(per="site")', SOME])
@pytest.mark.parametrize("stages", ["", "noise(share=1e-9)"])
def test_each_group_is_averaged_over_those_who_trained_it(tmp_path: Path, part: str, stages: str) -> None:
    round_ = Round(tmp_path, part, stages=stages)
    folded = aggregate(round_.node, round_.spec, round_.order)
    version = tensors.load(round_.blobs.path(folded.version.adapter))
    assert version.keys() == SCHEMA.keys()
    untouched = SCHEMA.keys() - set().union(*round_.has.values())
    assert untouched or "half" in part
    for key, wanted in round_.expected().items():
        torch.testing.assert_close(version[key], wanted)
        assert key not in untouched or torch.equal(version[key], round_.last[key])
    assert folded.version.broadcast[""].digest == folded.version.adapter
    late = replace(round_.order, updates=round_.order.updates[::-1])
    assert aggregate(round_.node, round_.spec, late).version == folded.version


def test_shards_of_different_sites_are_what_each_has_trained_bit_for_bit(tmp_path: Path) -> None:
    round_ = Round(tmp_path, 'by-capability(shards=4,sites={"bank":1,"clinic":1,"ward":2})')
    folded = aggregate(round_.node, round_.spec, round_.order)
    version = tensors.load(round_.blobs.path(folded.version.adapter))
    seeds = {key: seed for seed, site in enumerate(SITES, 1) for key in round_.has[site]}
    assert seeds.keys() == SCHEMA.keys() and sum(map(len, round_.has.values())) == len(SCHEMA)
    assert all(torch.equal(version[key], adapter(seed)[key]) for key, seed in seeds.items())


def test_what_sites_chose_is_folded_by_what_they_told(tmp_path: Path) -> None:
    round_ = Round(tmp_path, "ist(share=0.34)", chosen={"bank": (0, 1), "clinic": (1, 4), "ward": (1, 5)})
    folded = aggregate(round_.node, round_.spec, round_.order)
    version = tensors.load(round_.blobs.path(folded.version.adapter))
    for key, wanted in round_.expected().items():
        torch.testing.assert_close(version[key], wanted)
    assert all(torch.equal(version[f"{at}.q"], round_.last[f"{at}.q"]) for at in (2, 3))


# what is refused


def judged(**fields: Any) -> None:
    legality.judge(RunSpec(model="nowhere", builders=(WHOLE,), **fields))


def test_a_strategy_that_folds_all_together_is_refused_with_those_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    judged(training=training("lisa"))
    monkeypatch.delattr(aggregation.STRATEGIES["low-rank"], "join")
    judged()
    with pytest.raises(
        InputError, match="strategy low-rank folds all tensors together, .*; use part all, or one of: f"
    ):
        judged(training=training("lisa"))


def test_a_part_of_a_method_of_which_nothing_trains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    measuring: dict[str, Any] = {"method": Choice(name="moments"), "strategy": Choice(name="sum")}
    judged(**measuring)
    with pytest.raises(InputError, match="training.part: the method moments measures, and nothing of it trains; use"):
        judged(**measuring, training=training("half"))


def test_feedback_beside_a_stage_that_packs_all_together_is_refused_in_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"hides": False, "phases": ("train",), "noise": 0.0}
    stages = {
        "clip": SimpleNamespace(name="clip", whole=True, feedback=False, **common),
        "sign": SimpleNamespace(name="sign", whole=False, feedback=True, **common),
    }
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    monkeypatch.setattr(legality.upload, "make", lambda chain: [stages[choice.name] for choice in chain])
    clip, sign = (Choice(name=name) for name in stages)
    for chain in ((clip,), (sign,)):
        judged(training=training("half"), upload=chain)
    judged(upload=(clip, sign))
    with pytest.raises(InputError, match="part half rounds pack other tensors, and what stage sign leaves out of one"):
        judged(training=training("half"), upload=(clip, sign))


def test_a_part_of_too_few_layers_is_refused_before_anything_is_built(material: Path) -> None:
    spec = RunSpec(
        model=str(material / "model"), builders=(WHOLE,), training=replace(training("lisa(layers=4)"), max_length=32)
    )
    with pytest.raises(
        InputError, match="training.part: part lisa draws 4 layers in each round, and the adapter has 4"
    ):
        legality.judge(spec)
    fewer = replace(spec, training=replace(spec.training, part=parse_one("lisa(layers=3)")))
    legality.judge(fewer)
    for method, strategy in (("amt", "vote"), ("ia3", "mean")):  # which are packed, and of peft's making
        legality.judge(replace(fewer, method=Choice(name=method), strategy=Choice(name=strategy)))
    with pytest.raises(InputError, match="there is no part 'lsa' .did you mean lisa"):
        legality.judge(replace(spec, training=replace(spec.training, part=Choice(name="lsa"))))
