"""Tasks that are known by their data: which adapter a held-out row is measured by, and what is published for that."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.bundles.stored import store_adapter
from offsite.coordinator.home import Home
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant, Known
from offsite.coordinator.runs.knowing import known
from offsite.coordinator.runs.legality import judge
from offsite.coordinator.runs.steps.building import build
from offsite.coordinator.runs.steps.evaluation import evaluate
from offsite.coordinator.runs.steps.folding import aggregate
from offsite.coordinator.runs.steps.orders import Aggregate, Build, Continued, Evaluate, Publish, Update
from offsite.coordinator.runs.steps.publishing import publish
from offsite.coordinator.runs.steps.results import Folded
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.coordinator.store.journal import Journal
from offsite.emulator import methods, zoo
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.modality import encode, read
from offsite.emulator.routing.tasks import Tasks
from offsite.protos import tensors
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import to_json, to_plain
from offsite.protos.errors import InputError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Ancestor, Choice, RunSpec, TrainingSpec

TEXTS = {"threes": "train.jsonl", "ones": "public.jsonl"}  # by task, the rows that its sites have
METHOD: Any = methods.make("signature", {"buckets": 1024})
MEASURED = Choice(name="signature", settings={"buckets": 1024})


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node", f"file://{tmp_path}/blobs").prepare()


@pytest.fixture
def batches(material: Path) -> Any:
    _, tokenizer = zoo.load_base(material / "model", dtype=torch.float32)

    def batches(text: str) -> Any:
        return evaluation_batches(encode(read(material / text), tokenizer, max_length=16), batch_size=5)

    return batches


def measured(node: Node, batches: Any) -> Known:
    """What a run gives that has measured a task's rows."""
    counts = [METHOD.counts(batch) for batch in batches]
    sums = {f"0.signature.{part}": sum(one[part].sum(0) for one in counts) for part in METHOD.sizes}
    return Known(method=MEASURED, sums=store_adapter(node.blobs(), node.scratch / "sums", sums).digest)


def test_rows_are_measured_by_the_adapter_of_the_task_that_they_are_like_whatever_their_set_is_called(
    node: Node, material: Path, tmp_path: Path, batches: Any
) -> None:
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join((material / text).read_text() for text in TEXTS.values()) + "\n")
    sets = {"a": str(both), **{task: str(material / text) for task, text in TEXTS.items()}}
    given: dict[str, Any] = {
        "model": str(material / "model"),
        "builders": (parse_one("uniform(keep=4)"),),
        "trainable": parse_one("ends(bottom=1, top=1)"),
        "method": parse_one("lora(rank=2)"),
        "training": TrainingSpec(steps=5, max_length=16),
        "memory": Choice(name="grown"),
        "known_by": "sums",
    }
    version, built, origin = None, None, None
    for at, (task, text) in enumerate(TEXTS.items()):
        before = Ancestor(run="before", round=at, rounds=at) if at else None
        own = measured(node, batches(text))
        grant = Grant(**given, evaluation=sets, task=task, known=own, continues=before)
        if version and built:
            own_of = {"base": built.base.digest, "trainable": built.bundle.trainable, "recovery": built.recovery}
            origin = Continued(version=version, **own_of)
        built = build(node, grant, Build(sites=("bank",), continued=origin))
        start, drawn = tensors.load(node.blobs().path(built.version.adapter)), torch.Generator().manual_seed(at)
        moved = {key: one + 0.3 * torch.randn(one.shape, generator=drawn) for key, one in start.items()}
        update = Update(site="bank", digest=store_adapter(node.blobs(), tmp_path / "u", moved).digest, examples=1)
        order = Aggregate(last=built.version, schema=built.schema, tiers={"bank": "r2"}, updates=(update,), round=at)
        version = aggregate(node, grant, order).version
    assert version and built
    assert {name for name in version.memory if "sums" in name} == {"memory.sums.threes", "memory.sums.ones"}

    ask: dict[str, Any] = {"base": built.base.digest, "recovery": built.recovery, "memory": version.memory}
    by_data = evaluate(node, grant, Evaluate(**ask, manifest=None, adapter=version.adapter)).sets
    by_name = evaluate(node, replace(grant, known=None), Evaluate(**ask, manifest=None, adapter=version.adapter)).sets
    for task in TEXTS:
        assert by_data[task].nll == pytest.approx(by_name[task].nll, rel=1e-6)
    assert by_data["a"].nll == pytest.approx(sum(by_data[task].nll for task in TEXTS), rel=1e-6)
    assert by_data["a"].tokens == by_name["a"].tokens and by_data["a"].nll != pytest.approx(by_name["a"].nll, rel=1e-4)

    files = publish(node, grant, Publish(**ask, adapter=version.adapter)).artifacts
    for name in ("tasks.json", "tasks.safetensors"):
        (tmp_path / name).write_bytes(node.blobs().path(files[name].digest).read_bytes())
    tasks = Tasks.load(tmp_path)
    for task, text in TEXTS.items():
        assert [*tasks.apart(batches(text))] == [task]
    document = json.loads((tmp_path / "tasks.json").read_text())
    (tmp_path / "tasks.json").write_text(json.dumps(document | {"settings": {"buckets": 64}}))
    with pytest.raises(ValueError, match=r"expected tasks.json with a method that tells tasks apart, and tasks.safe"):
        Tasks.load(tmp_path)


def finished(journal: Journal, name: str, method: str, **fields: Any) -> None:
    """A run whose one round is done."""
    grant = Grant(model="m", method=parse_one(method), **fields)
    journal.add_run(name, token=name, owner="alice", spec=to_json(grant), granted=to_plain(grant))
    journal.add_step(name, "version:0", {})
    sent = Stored(digest=digest_bytes(name.encode()), size=1)
    version = Version(adapter=sent.digest, broadcast={"": sent})
    journal.add_step(name, "version:1", to_plain(Folded(version=version, lineage={})))


def test_a_task_is_known_by_a_run_that_measured_rows_as_those_before_it_did(tmp_path: Path) -> None:
    journal = Home(tmp_path / "home", tmp_path / "kit").prepare().journal()
    for name, method in (("spring", "signature(salt=spring)"), ("autumn", "signature(salt=autumn)"), ("lora", "lora")):
        finished(journal, name, method)
    finished(journal, "codes", "prototype")
    spec = RunSpec(model="m", known_by="spring:1")
    own = known(journal, spec, None)
    assert own == Known(method=parse_one("signature(salt=spring)"), sums=digest_bytes(b"spring"))
    finished(journal, "first", "lora", known=own)
    before = Ancestor(run="first", round=1, rounds=1)
    assert known(journal, spec, before) == own
    for name, words in {
        "autumn": "measured by .*autumn.*, and the tasks before by .*spring.*: only like sums are compared",
        "lora": "is of the method lora, which does not tell the task of a row .*; name a run of signature",
        "codes": "is of the method prototype, which does not tell",
    }.items():
        with pytest.raises(InputError, match=f"known_by: run {name} {words}"):
            known(journal, replace(spec, known_by=f"{name}:1"), before)
    with pytest.raises(InputError, match="known_by: run spring is queued; name a round of it"):
        known(journal, replace(spec, known_by="spring"), None)


def test_a_run_whose_memory_keeps_nothing_by_task_has_none_to_tell(material: Path) -> None:
    spec = RunSpec(
        model=str(material / "model"),
        builders=(Choice(name="whole"),),
        training=TrainingSpec(max_length=16),
        known_by="sums",
        memory=Choice(name="lae"),
    )
    with pytest.raises(InputError, match="known_by: memory lae keeps nothing by task"):
        judge(spec)
