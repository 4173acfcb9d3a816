"""What a stream of three tasks leaves of each, by memory and retention: SmolLM2-135M, three sites, what they forget.

    python tests/bench/stream.py [--arm NAME ...] [--seed N ...] [--rounds N] [--steps N] [--out FILE]

Each task's rows are shared out over three sites, which train in rounds with the engine of a site; the coordinator folds
what they send and its memory makes versions of it, by the same functions as in a run. After each task every task so far
is measured on rows that nobody trained on, by what serves. *Learned* is the loss (nats a token) of a task at its own
end, *end* that after the last task, and *forgotten* their difference, over all tasks but the last. LAE's online adapter
is what a run without a memory ends in, so that one training tells of both. Prints a table, and with --out writes all
losses as JSON, of which `tests/bench/stream_plot.py` makes the table and the plot of docs/memory.md.

Only the six highest layers train, and what the frozen ones below make of a row is computed once.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from offsite.client.demo import data
from offsite.client.site.engines import Ranks
from offsite.client.site.engines.plain import Plain
from offsite.client.site.job import EngineSpec
from offsite.coordinator import aggregation, memory
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.memory import Memory, Moment
from offsite.emulator import methods, modality, parts, retention, zoo
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import evaluation_batches, schedule
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.methods.fisher import Fisher
from offsite.emulator.modality import Batch, collate, encode, read
from offsite.emulator.parts import Turn
from offsite.emulator.parts.training import Trained, freeze, whole_schema
from offsite.emulator.plug import plug_all
from offsite.emulator.retention import Rehearsing
from offsite.emulator.retention.ewc import FISHER, Ewc
from offsite.kernels.schema import Schema, Tensors, only
from offsite.protos.recipes import parse_one
from offsite.protos.spec import LocalTraining

TASKS, SITES, BATCH, LENGTH, LOWEST = ("bank", "hospital", "school"), 3, 4, 96, 24
LAYERS = {place: place for place in range(LOWEST, 30)}
PLAIN = Ranks(0, 1, torch.device("cpu"))
Losses = dict[str, dict[str, dict[str, float]]]  # by what serves, the task that has just ended, and the task measured


@dataclass(frozen=True)
class Arm:
    """How a stream is learned."""

    method: str
    strategy: str
    memory: str
    rate: float
    retention: str = "none"
    part: str = "all"  # of the adapter that later tasks train


ARMS = {
    "lora": Arm("lora", "low-rank", "lae(c=1.25)", 1e-3),
    "factor-mean": Arm("lora", "factor-mean", "none", 1e-3),
    "ewc": Arm("lora", "factor-mean", "none", 1e-3, "ewc(strength=300.0)"),  # whose values keep their meaning
    "replay": Arm("lora", "low-rank", "none", 1e-3, "replay"),
    "grown": Arm("lora", "low-rank", "grown", 1e-3),
    "mos": Arm("mos", "mean", "none", 3e-3),
    "shards": Arm("mos", "mean", "shard-store", 3e-3),
    "frozen-shards": Arm("mos", "mean", "shard-store(c=0.0)", 3e-3),
    "mhr": Arm("mhr", "mean", "none", 3e-3),
    "routing": Arm("mhr", "mean", "shard-store(c=0.0)", 3e-3, part="by-task"),  # MHR-z
}


class Below(nn.Module):
    """What the frozen layers below make of each row, in the place of the embeddings."""

    def __init__(self, base: nn.Module, samples: Sequence[Any]) -> None:
        super().__init__()
        self.known: dict[tuple[int, ...], Tensor] = {}
        seen: list[Tensor] = []
        hook = layers(base)[LOWEST].register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
        with torch.no_grad():
            for ids in {sample.input_ids for sample in samples}:
                base(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
                self.known[ids] = seen.pop()
        hook.remove()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look rows up; they are padded on the right, and what is there does not matter."""
        rows = []
        for padded in input_ids.tolist():
            ids = tuple(padded)
            while ids not in self.known:
                ids = ids[:-1]
            rows.append(nn.functional.pad(self.known[ids], (0, 0, 0, len(padded) - len(ids))))
        return torch.stack(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Below":
        return self


def passed(hidden_states: Tensor, *rest: Any, **more: Any) -> Tensor:
    """Be a layer that is computed already."""
    return hidden_states


class Stream:
    """A model, and by task what each site has and the exam."""

    def __init__(self, seed: int, *, rounds: int, steps: int, examples: int, held_out: int) -> None:
        """Read all, from the cache if it is there."""
        self.seed, self.rounds, self.steps = seed, rounds, steps
        cache = zoo.cache_folder()
        self.base, tokenizer = zoo.load_base(zoo.locate("smollm2-135m-instruct", cache=cache), torch.float32)
        with TemporaryDirectory() as folder:
            made = data.prepare(Path(folder), cache=cache, examples=examples, held_out=held_out, seed=seed, exam=True)
            files = {site.name: site for site in made}

            def samples(file: Path) -> list[Any]:
                return encode(read(file), tokenizer, max_length=LENGTH, divide=False)

            self.texts = {task: samples(files[task].train) for task in TASKS}
            exams = {task: samples(files[task].held_out) for task in TASKS}
        self.exams = {task: evaluation_batches(exams[task], batch_size=8) for task in TASKS}
        below = Below(self.base, [sample for one in (*self.texts.values(), *exams.values()) for sample in one])
        self.base.set_input_embeddings(below)
        for layer in layers(self.base)[:LOWEST]:
            layer.forward = passed

    def losses(self, method: Method, own: Memory, version: Version, upto: int) -> dict[str, dict[str, float]]:
        """Return by what serves the loss of each task so far."""
        experts = own.experts(version)
        tasks = {task: self.exams[task] for task in TASKS[: upto + 1]}
        if own.combine == "route":
            names = {task: task if task in experts else next(iter(experts)) for task in tasks}
            return {
                "served": {task: self._loss(method, {"": experts[names[task]]}, exam) for task, exam in tasks.items()}
            }
        serving: dict[str, Mapping[str, Adapter]] = {name: {name: one} for name, one in experts.items()}
        if own.combine == "max":
            serving["ensemble"] = experts
        return {
            name: {task: self._loss(method, adapters, exam) for task, exam in tasks.items()}
            for name, adapters in serving.items()
        }

    def _loss(self, method: Method, adapters: Mapping[str, Adapter], exam: list[Batch]) -> float:
        return modality.score(plug_all(copy.deepcopy(self.base), method, dict(adapters)), exam).mean

    def run(self, arm: Arm) -> Losses:
        """Learn the tasks one after the other, each in a run that goes on from the one before."""
        method = methods.make(arm.method, {})
        strategy, choice = aggregation.make(arm.strategy, {}), parse_one(arm.memory)
        own = memory.make(choice.name, choice.settings)
        tier = method.tier_at("")
        begun = method.start(self.base, LAYERS, seed=self.seed, tier=tier)
        start = last = Version(begun, {tier: begun})
        schema, losses, held = method.schema(begun), Losses(), Held(self, arm)
        for at, task in enumerate(TASKS):
            moments = [
                Moment(number, self.rounds, self.steps, at * self.rounds, task) for number in range(self.rounds + 1)
            ]
            last = handed_on(last, own.begin(last, start, schema, moments[0]))
            anchor = held.anchor(last.broadcast[tier], schema)
            for moment in moments[1:]:
                fold = strategy.begin(last, schema)
                for site in range(SITES):
                    first = (moment.before + moment.round - 1) * self.steps
                    adapter = held.trained(method, last.broadcast[tier], task, site, first, anchor)
                    fold.add(adapter, Origin(f"{site}", tier, 1 / SITES))
                new = fold.finish([tier])
                last = handed_on(new, own.after(last, new, schema, moment))
            held.keep(task, last.broadcast[tier])
            for name, measured in self.losses(method, own, last, at).items():
                losses.setdefault(name, {})[task] = measured
        return losses


class Held:
    """The sites' training of an arm, and what they keep of its tasks."""

    def __init__(self, stream: Stream, arm: Arm) -> None:
        self.stream, self.arm, self.choice = stream, arm, parse_one(arm.retention)
        self.retention = retention.make(self.choice.name, self.choice.settings)
        self.kept: list[list[Any]] = [[] for _ in range(SITES)]
        self.fisher: Tensors = {}

    def trained(self, method: Method, start: Adapter, task: str, site: int, first: int, anchor: Tensors) -> Adapter:
        """Train a site's round."""
        stream, own, kept = self.stream, self.stream.texts[task][site::SITES], self.kept[site]
        model = method.attach(copy.deepcopy(stream.base), LAYERS, start)
        training = LocalTraining(
            steps=stream.steps,
            batch_size=BATCH,
            learning_rate=self.arm.rate,
            retention=self.choice if anchor or not self.retention.starts else parse_one("none"),
            seed=stream.seed,
            max_length=LENGTH,
        )
        parameters = method.named_parameters(model, LAYERS)
        if first >= stream.rounds * stream.steps:
            whole, part = whole_schema(method, start), parse_one(self.arm.part)
            trained = parts.make(part.name, part.settings).groups(whole, Turn(stream.seed, 0, str(site)))
            parameters = freeze(parameters, Trained(only(whole, trained)))
        engine = Plain(model, parameters, training, EngineSpec(name="plain"), PLAIN, first_step=first, anchor=anchor)
        old = self.retention.rehearsed(BATCH) if kept and isinstance(self.retention, Rehearsing) else 0
        which = {"steps": stream.steps, "first_step": first, "seed": stream.seed}
        order = schedule(len(own), batch_size=BATCH - old, **which)
        again = schedule(len(kept), batch_size=old, **which) if old else [[] for _ in order]
        model.train()
        for new, rehearsed in zip(order, again, strict=True):
            engine.step(collate([*(own[row] for row in new), *(kept[row] for row in rehearsed)]))
        return method.state(model, LAYERS)

    def anchor(self, broadcast: Adapter, schema: Schema) -> Tensors:
        """Return what a task's sites are sent; the first has nothing to be held to."""
        return self.retention.anchor(broadcast, schema, {FISHER: self.fisher}) if self.fisher else {}

    def keep(self, task: str, adapter: Adapter) -> None:
        """Keep of a task what the next ones need."""
        stream = self.stream
        if isinstance(self.retention, Rehearsing):
            for site, kept in enumerate(self.kept):
                kept += self.retention.sample(stream.texts[task][site::SITES], seed=stream.seed)
        if isinstance(self.retention, Ewc):
            measuring = Fisher()
            begun = measuring.begin(stream.base, LAYERS, adapter, seed=stream.seed, tier=measuring.tier_at(""))
            model = measuring.attach(copy.deepcopy(stream.base), LAYERS, begun)
            for batch in evaluation_batches(stream.texts[task], batch_size=BATCH):
                measuring.measure(model, LAYERS, batch)
            _, self.fisher = measuring.apart(measuring.state(model, LAYERS), self.fisher)


def handed_on(given: Version, made: Version) -> Version:
    """Have sites start from another adapter that a memory made; with a plain mean that is the adapter itself."""
    if made.adapter is given.adapter or made.broadcast is not given.broadcast:
        return made
    return replace(made, broadcast=dict.fromkeys(made.broadcast, made.adapter))


def figures(losses: dict[str, dict[str, float]], learned: dict[str, float]) -> dict[str, float]:
    """Return what a stream comes to, by what each task had learned at its own end."""
    end = losses[TASKS[-1]]
    forgotten = fmean(end[task] - learned[task] for task in TASKS[:-1])
    return {"forgotten": forgotten, "newest": end[TASKS[-1]], "end": fmean(end.values())}


def main() -> None:
    """Run the arms, one seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of an optimiser, of each site in a round")
    parser.add_argument("--examples", type=int, default=72, help="of each task, shared out over the sites")
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    outcome = []
    for seed in given.seed:
        stream = Stream(seed, rounds=given.rounds, steps=given.steps, examples=given.examples, held_out=given.held_out)
        for arm in given.arm:
            served = stream.run(ARMS[arm])
            newest = next(iter(served.values()))  # what the rounds gave
            learned = {task: newest[task][task] for task in TASKS}
            for serves, losses in served.items():
                told = figures(losses, learned)
                outcome.append({"arm": arm, "serves": serves, "seed": seed, "losses": losses} | told)
                row = "  ".join(f"{name} {value:7.3f}" for name, value in told.items())
                print(f"{arm:14} {serves:10} seed {seed}  {row}", flush=True)
    if given.out:
        given.out.write_text(json.dumps({"settings": vars(given) | {"out": None}, "outcome": outcome}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
