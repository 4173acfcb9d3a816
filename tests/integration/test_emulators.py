"""Every kind of emulator through a whole round: built, trained at two sites, averaged, measured and published."""

from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from offsite.client import Choice, RunSpec, TrainingSpec
from offsite.client.site.engines.base import EngineSpec
from offsite.client.site.job import TrainerJob
from offsite.client.site.policy import Policy
from offsite.client.site.training import train
from offsite.coordinator.home import Home
from offsite.coordinator.runs.report import training
from offsite.coordinator.runs.steps.orders import Aggregate, Build, Evaluate, Order, Publish, Realign, Update
from offsite.coordinator.runs.steps.performing import perform
from offsite.coordinator.runs.steps.results import Built, Evaluation, Folded, Publication, Realigned
from offsite.coordinator.store.blobs import Blobs
from offsite.emulator import zoo
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.catalogue import METHODS
from offsite.emulator.modality import encode, read, score
from offsite.emulator.plug import load
from offsite.protos.chunks import hex_of
from offsite.protos.documents import from_json, to_json
from offsite.protos.figures import perplexity
from offsite.protos.recipes import parse, parse_one
from offsite.protos.security.pki import Authority
from offsite.protos.spec import Manifest, TaskSpec, UpdateMetrics

R = TypeVar("R")
SITES = ("bank", "hospital")


def mergeable(recipe: str) -> bool:
    return METHODS[parse_one(recipe).name].mergeable


class Round:
    """One run's steps in this process, one after the other, without the journal between them."""

    def __init__(self, folder: Path, material: Path, *, builder: str, method: str, **changes: Any) -> None:
        self.kit = Authority.create(folder / "pki").issue("coordinator", "owner")
        self.home = Home(folder / "home", self.kit).prepare()
        self.blobs: Blobs = self.home.blobs()
        self.folder, self.material = folder, material
        fields: dict[str, Any] = {
            "model": str(material / "model"),
            "builders": parse(builder),
            "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
            "method": parse_one(method),
            "training": TrainingSpec(steps=4, learning_rate=0.01, max_length=32, seed=3),
            "public": str(material / "public.jsonl"),
            "evaluation": {"exam": str(material / "held-out.jsonl")},
            "merge": mergeable(method),
        }
        self.spec = RunSpec(**{**fields, **changes})
        self.built = self.do(Build(sites=SITES), Built)

    def do(self, order: Order, gives: type[R]) -> R:
        result = perform(self.home.node, order.step, to_json(self.spec), to_json(order))
        return from_json(gives, result, where=order.step)

    def aggregate(self, *updates: Update) -> str:
        built = self.built
        order = Aggregate(last=built.version, schema=built.schema, tiers=built.tiers, updates=updates)
        return self.do(order, Folded).version.adapter

    def train(self, site: str, manifest: str) -> Update:
        listed = from_json(Manifest, self.blobs.path(manifest).read_bytes(), where="manifest")
        bundle = self.folder / f"bundle-{hex_of(manifest, most=8)}"
        for entry in listed.files:
            (bundle / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (bundle / entry.path).write_bytes(self.blobs.path(entry.digest).read_bytes())
        tier = self.built.tiers[site]
        sent = self.built.version.broadcast[tier]
        task = TaskSpec(
            **{"run": "r", "round": 0, "rounds": 1, "site": site, "attempt": 0, "base": listed.base.digest},
            **{"manifest": manifest, "manifest_size": 1, "adapter": sent.digest, "adapter_size": 1, "update_size": 1},
            **{
                "method": self.built.method,
                "tier": tier,
                "method_hash": self.built.method_hash,
                "training": training(self.spec, self.built.learning_rate),
            },
        )
        (self.folder / "secret").write_bytes(bytes(32))
        job = TrainerJob(
            bundle=str(bundle),
            manifest=listed,
            adapter=str(self.blobs.path(sent.digest)),
            data=str(self.material / f"{site}.jsonl"),
            task=task,
            engine=EngineSpec(name="plain", device="cpu"),
            policy=Policy(bases=("any",), data=("/",), suspicious="warn"),
            secret=str(self.folder / "secret"),
            out=str(self.folder / site),
        )
        train(job, say=lambda event, **fields: None, rendezvous=self.folder / "rendezvous")
        metrics = from_json(UpdateMetrics, (self.folder / site / "metrics.json").read_bytes(), where="metrics")
        digest, _ = self.blobs.take(self.folder / site / "update.safetensors")
        return Update(site=site, digest=digest, examples=metrics.examples)

    def figure(self, *, manifest: str | None, adapter: str | None) -> float:
        built = self.built
        order = Evaluate(base=built.base.digest, manifest=manifest, adapter=adapter, recovery=built.recovery)
        return perplexity(self.do(order, Evaluation).sets.values())


RECIPES = [
    ("crash(keep=5,sharing=on)", "blocks", "mean"),
    ("crash(keep=5)+distilled(steps=3)+quantised(format=int4,block=16)", "lora(rank=4)", "low-rank"),
    ("loram(mlp=0.25,attention=0.5,first=1,last=1)+quantised(layers=all)", "lora(rank=4)", "low-rank"),
    ("whole+additive(group=4,bits=4,steps=2)", "paca(rank=4)", "low-rank"),
    ("loram(mlp=0.25,attention=0.5,first=1,last=1)", "s2ft(channels=0.3,groups=0.5,before=true)", "low-rank"),
    ("loram(mlp=0.25,attention=0.5,first=1,last=1)", "lora(rank=4,init=pissa)", "low-rank"),
    ("crash(keep=5)+quantised(format=int4,block=16)", "mos", "mean"),
    ("sketch(groups=2)", "grids", "mean"),
    ("crash(keep=5)+quantised(format=int4,block=16)", "spiel(share=0.05)", "index-union"),
    ("loram(mlp=0.25,attention=0.5,first=1,last=1)", "lt-sft(share=0.05)", "index-union"),
    ("crash(keep=5)+quantised(format=int4,block=16)", "ssf", "mean"),
    ("loram(mlp=0.25,attention=0.5,first=1,last=1)", "hydra", "low-rank"),
    ("crash(keep=5)+quantised(format=int4,block=16)", "bottleneck(width=8)", "low-rank"),
    ("loram(mlp=0.25,attention=0.5,first=1,last=1)", "bottleneck(width=8,form=parallel)", "mean"),
]


@pytest.mark.parametrize(
    ("builder", "method", "strategy"),
    [pytest.param(*recipe, marks=[pytest.mark.slow] if at > 3 else []) for at, recipe in enumerate(RECIPES)],
)
def test_what_is_trained_on_an_emulator_comes_back_to_the_base(
    tmp_path: Path, material: Path, builder: str, method: str, strategy: str
) -> None:
    torch.set_num_threads(1)
    extra = {"trainable": Choice(name="kept")} if "sketch" in builder or "loram" in builder else {}
    run = Round(tmp_path, material, builder=builder, method=method, strategy=Choice(name=strategy), **extra)
    manifest, base = run.built.manifest, run.built.base.digest
    adapter = run.aggregate(*(run.train(site, manifest) for site in SITES))
    assert run.figure(manifest=manifest, adapter=adapter) < run.figure(manifest=manifest, adapter=None)
    plug_in = run.figure(manifest=None, adapter=adapter)
    assert plug_in < run.figure(manifest=None, adapter=None)

    published = run.do(Publish(base=base, adapter=adapter, recovery=run.built.recovery), Publication)
    for name, file in published.artifacts.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(run.blobs.path(file.digest).read_bytes())
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        if not mergeable(method):  # what is published stays beside the base, and is as good there
            base, tokenizer = zoo.load_base(material / "model", dtype=torch.float32)
            beside = load(base, tmp_path / "out" / "adapter")
            exam = encode(read(material / "held-out.jsonl"), tokenizer, max_length=32)
            assert score(beside, evaluation_batches(exam, batch_size=8)).perplexity == pytest.approx(plug_in, rel=1e-4)
            return
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
        original = AutoModelForCausalLM.from_pretrained(material / "model")
        assert float((merged(ids).logits - original(ids).logits).abs().max()) > 1e-3
        if (tmp_path / "out" / "adapter" / "adapter_config.json").exists():  # an ordinary adapter of the full base
            adapted = PeftModel.from_pretrained(original, tmp_path / "out" / "adapter")
            torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
        if method == "blocks":
            (stored,) = (tmp_path / "out" / "adapter").iterdir()
            state = merged.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in load_file(stored).items())


def test_an_emulator_is_realigned_beside_the_adapter_and_its_trainable_layers_stay(
    tmp_path: Path, material: Path
) -> None:
    torch.set_num_threads(1)
    run = Round(
        tmp_path, material, builder="uniform(keep=4)+distilled(steps=2)", method="lora(rank=4)", realign_steps=3
    )
    first = run.built.manifest
    adapter = run.aggregate(run.train("bank", first))
    order = Realign(base=run.built.base.digest, manifest=first, adapter=adapter, recovery=None)
    again = run.do(order, Realigned).manifest
    assert again == run.do(order, Realigned).manifest != first
    before, after = (
        from_json(Manifest, run.blobs.path(digest).read_bytes(), where="manifest") for digest in (first, again)
    )
    assert (before.layers, before.trainable, before.verbatim) == (after.layers, after.trainable, after.verbatim)
    same = [a.digest == b.digest for a, b in zip(before.files, after.files, strict=True) if a.path.startswith("model-")]
    assert same == [True, True, False, False, True]  # the rest, layer 0 which trains, two frozen ones, layer 5
