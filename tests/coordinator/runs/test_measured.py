"""A run that begins from what the sites of another have measured: from the first bundle to the site that trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client.site.inspection import receive
from offsite.coordinator.bundles.stored import open_bundle, store_adapter
from offsite.coordinator.home import Home
from offsite.coordinator.runs.continuing import ancestor, continued
from offsite.coordinator.runs.continuing import judge as judge_start
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.legality import beginning, judge
from offsite.coordinator.runs.steps.building import build
from offsite.coordinator.runs.steps.folding import aggregate
from offsite.coordinator.runs.steps.orders import Aggregate, Build, Publish, Update
from offsite.coordinator.runs.steps.publishing import publish
from offsite.coordinator.runs.steps.results import Built
from offsite.emulator import bundle, methods
from offsite.emulator.modality import collate, encode, read
from offsite.protos import tensors
from offsite.protos.documents import to_json, to_plain
from offsite.protos.errors import InputError, MismatchError
from offsite.protos.events import Completed
from offsite.protos.spec import Ancestor, Choice, RunSpec, TrainingSpec

SITES = ("bank", "clinic")
MOMENTS = Choice(name="moments", settings={"of": "inputs"})
CORDA = Choice(name="lora", settings={"rank": 2, "init": "corda"})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, kit: Path) -> Home:
    return Home(tmp_path_factory.mktemp("measured") / "home", kit).prepare()


@pytest.fixture(scope="module")
def finished(home: Home, material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, Ancestor]:
    """A run of one round that has measured, in the journal."""
    grant, journal = Grant(**fields(material)), home.journal()
    built = build(home.node, grant, Build(sites=SITES))
    folded = aggregate(home.node, grant, measured(home, material, built, tmp_path_factory.mktemp("scratch")))
    journal.add_run("sums", token="sums", owner="alice", spec=to_json(grant), granted=to_plain(grant))
    journal.add_step("sums", "version:0", to_plain(built))
    journal.add_step("sums", "version:1", to_plain(folded))
    journal.end_run("sums", Completed(), report="{}", published={})
    return built, ancestor(journal, "sums")


def fields(material: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "model": str(material / "model"),
        "builders": (Choice(name="uniform", settings={"keep": 4}),),
        "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
        "training": TrainingSpec(batch_size=4, max_length=16),
        "strategy": Choice(name="sum"),
        "method": MOMENTS,
    }
    return given | changes


def measured(home: Home, material: Path, built: Built, scratch: Path) -> Aggregate:
    """What two sites measure on a half of the text each, as an order to fold it."""
    method: Any = methods.make(MOMENTS.name, MOMENTS.settings)
    listed, model, tokenizer = open_bundle(home.blobs(), built.manifest, scratch / "bundle", dtype=torch.float32)
    places = bundle.described(listed).outline.places
    samples = encode(read(material / "train.jsonl"), tokenizer, max_length=16)
    model = method.attach(model, places, tensors.load(home.blobs().path(built.version.broadcast[""].digest)))
    updates = []
    for site, some in zip(SITES, (samples[:4], samples[4:]), strict=True):
        for total in method.sums(model, places):
            total.zero_()
        method.measure(model, places, collate(some))
        stored = store_adapter(home.blobs(), scratch / "update", method.state(model, places))
        updates.append(Update(site=site, digest=stored.digest, examples=len(some)))
    return Aggregate(last=built.version, schema=built.schema, tiers=built.tiers, updates=tuple(updates))


def test_sites_measure_and_the_next_run_begins_from_the_sums_of_all(
    home: Home, finished: tuple[Built, Ancestor], material: Path, tmp_path: Path
) -> None:
    built, sums = finished
    last = continued(home.journal(), sums)
    total = tensors.load(home.blobs().path(last.version.adapter))
    assert all(bool(value.any()) for value in total.values())
    sent = tensors.load(home.blobs().path(last.version.broadcast[""].digest))
    assert not any(bool(value.any()) for value in sent.values()), "no site is sent what others measured"

    run = fields(material, method=CORDA, strategy=Choice(name="low-rank"), start="sums")
    grant = Grant(**run, continues=sums)
    judge(RunSpec(**run))
    judge_start(home.journal(), home.blobs(), grant, tiers=frozenset({"r2"}), begins=beginning(grant))
    begun, again = (build(home.node, grant, Build(sites=SITES, continued=last)) for _ in range(2))
    assert begun.version == again.version and begun.base == built.base
    adapter = tensors.load(home.blobs().path(begun.version.adapter))
    method: Any = methods.make(CORDA.name, CORDA.settings)
    listed, model, _ = open_bundle(home.blobs(), begun.manifest, tmp_path / "again", dtype=torch.float32)
    places = bundle.described(listed).outline.places
    wanted = method.begin(model, places, total, seed=0)
    assert adapter.keys() == wanted.keys() and all(torch.equal(adapter[key], wanted[key]) for key in wanted)
    assert all(bool(adapter[key].any()) for key in adapter)

    start = method.start(model, places, seed=0)
    file = home.blobs().path(begun.version.broadcast["r2"].digest)
    received = receive(file, method, start)
    assert all(torch.equal(received[key], adapter[key]) for key in adapter)
    other: Any = methods.make("lora", {"rank": 3, "init": "corda"})
    with pytest.raises(MismatchError, match=r"the adapter to start from has \d+ values that train, the task's method"):
        receive(file, other, other.start(model, places, seed=0))
    order = Publish(base=built.base.digest, adapter=last.version.adapter, recovery=built.recovery)
    published = publish(home.node, Grant(**fields(material)), order)
    assert "adapter/offsite_adapter.safetensors" in published.artifacts


def test_a_run_without_what_it_begins_from_is_told_what_to_do(
    home: Home, finished: tuple[Built, Ancestor], material: Path
) -> None:
    run = fields(material, method=CORDA, strategy=Choice(name="low-rank"))
    with pytest.raises(
        InputError, match="start: the method lora with these settings begins from the inputs .* moments"
    ):
        judge(RunSpec(**run))
    with pytest.raises(InputError, match="strategy low-rank cannot average method moments.*use one of: sum"):
        judge(RunSpec(**fields(material, strategy=Choice(name="low-rank"))))
    _, sums = finished
    journal, blobs = home.journal(), home.blobs()

    def refused(words: str, **changes: Any) -> None:
        grant = Grant(**run | changes, continues=sums)
        with pytest.raises(InputError, match=words):
            judge_start(journal, blobs, grant, tiers=frozenset(), begins=beginning(grant))

    gradients = replace(CORDA, settings={"rank": 2, "init": "lora-ga"})
    refused("is of the method moments, which measured inputs, and this run begins from the gradients", method=gradients)
    refused("is of trainable .*, this run of", trainable=Choice(name="kept"))
    refused("is of model .*, this run of", model="other")
    refused("is of method .*moments.*, this run of .*lora", method=Choice(name="lora"))
    plain = Grant(**run | {"method": Choice(name="lora")})
    assert beginning(plain) is None
    why: Any = beginning(Grant(**run))
    assert "is of the method lora, which measured nothing" in why(plain)
