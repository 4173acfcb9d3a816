"""What a stream of three tasks leaves of each, by memory: SmolLM2-135M, three sites, and what they forget.

    python tests/bench/stream.py [--arm NAME ...] [--seed N ...] [--rounds N] [--steps N] [--out FILE]

Each task's rows are shared out over three sites, which train in rounds; the coordinator folds what they send and its
memory makes versions of it, by the same functions as in a run. After each task every task so far is measured on rows
that nobody trained on, by what serves. *Learned* is the loss (nats a token) of a task at its own end, *end* that after
the last task, and *forgotten* their difference, over all tasks but the last. LAE's online adapter is what a run without
a memory ends in, so that one training tells of both. Prints a table, and with --out writes all losses as JSON.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from offsite.client.demo import data
from offsite.coordinator import aggregation, memory
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.memory import Memory, Moment
from offsite.emulator import methods, modality, zoo
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.modality import Batch, encode, read
from offsite.emulator.plug import plug_all
from offsite.emulator.precision import DTYPES, fastest
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.protos.recipes import parse_one

TASKS, SITES, BATCH, LENGTH = ("bank", "hospital", "school"), 3, 4, 96
LAYERS = {place: place for place in range(26, 30)}
ARMS = {  # method, strategy, memory, learning rate
    "lae": ("lora", "low-rank", "lae", 1e-3),
    "grown": ("lora", "low-rank", "grown", 1e-3),
    "shards": ("mos", "mean", "shard-store", 3e-3),
    "frozen-shards": ("mos", "mean", "shard-store(c=0.0)", 3e-3),
    "mos": ("mos", "mean", "none", 3e-3),
}
Losses = dict[str, dict[str, dict[str, float]]]  # by what serves, the task that has just ended, and the task measured


class Stream:
    """A model, and by task what each site has and the exam."""

    def __init__(self, seed: int, *, rounds: int, steps: int, examples: int, held_out: int) -> None:
        """Read all, from the cache if it is there."""
        self.seed, self.rounds, self.steps = seed, rounds, steps
        cache = zoo.cache_folder()
        dtype = DTYPES[fastest(torch.device("cpu"))]
        self.base, tokenizer = zoo.load_base(zoo.locate("smollm2-135m-instruct", cache=cache), dtype)
        with TemporaryDirectory() as folder:
            made = data.prepare(Path(folder), cache=cache, examples=examples, held_out=held_out, seed=seed)
            files = {site.name: site for site in made}

            def samples(file: Path) -> list[Any]:
                return encode(read(file), tokenizer, max_length=LENGTH, divide=False)

            self.texts = {task: samples(files[task].train) for task in TASKS}
            self.exams = {task: evaluation_batches(samples(files[task].held_out), batch_size=8) for task in TASKS}

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

    def run(self, arm: str) -> Losses:
        """Learn the tasks one after the other, each in a run that goes on from the one before."""
        called, folding, remembering, rate = ARMS[arm]
        method = methods.make(called, {})
        strategy, choice = aggregation.make(folding, {}), parse_one(remembering)
        own = memory.make(choice.name, choice.settings)
        tier = method.tier_at("")
        begun = method.start(self.base, LAYERS, seed=self.seed, tier=tier)
        start = last = Version(begun, {tier: begun})
        schema, losses = method.schema(begun), Losses()
        for at, task in enumerate(TASKS):
            moments = [
                Moment(number, self.rounds, self.steps, at * self.rounds, task) for number in range(self.rounds + 1)
            ]
            last = handed_on(last, own.begin(last, start, schema, moments[0]))
            for moment in moments[1:]:
                fold = strategy.begin(last, schema)
                for site in range(SITES):
                    seed = hash((self.seed, at, moment.round, site)) % 2**31
                    schedule = Schedule(self.steps, rate, batch_size=BATCH, seed=seed)
                    adapter = self._trained(method, last.broadcast[tier], self.texts[task][site::SITES], schedule)
                    fold.add(adapter, Origin(f"{site}", tier, 1 / SITES))
                new = fold.finish([tier])
                last = handed_on(new, own.after(last, new, schema, moment))
            for name, measured in self.losses(method, own, last, at).items():
                losses.setdefault(name, {})[task] = measured
        return losses

    def _trained(self, method: Method, start: Adapter, texts: list[Any], schedule: Schedule) -> Adapter:
        model: nn.Module = method.attach(copy.deepcopy(self.base), LAYERS, start)
        tune(model, method.named_parameters(model, LAYERS), texts, schedule)
        return method.state(model, LAYERS)


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
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of an optimiser, of each site in a round")
    parser.add_argument("--examples", type=int, default=72, help="of each task, shared out over the sites")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    outcome = []
    for seed in given.seed:
        stream = Stream(seed, rounds=given.rounds, steps=given.steps, examples=given.examples, held_out=given.held_out)
        for arm in given.arm:
            served = stream.run(arm)
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
