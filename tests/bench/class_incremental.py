"""Learn ten digits, two at a time, over three sites: model surgery against an adapter that goes on (minutes).

    PYTHONPATH=.src python tests/bench/class_incremental.py --seeds 0 1 2

A small ViT learns the ten digits of scikit-learn as they are, from half of its images. The stream is of the other half,
turned over and inverted: five tasks of two classes each. In a round each of three sites trains the adapter and the head
on its rows of the task, with the loss over the task's own classes, and the coordinator averages by their rows. Then all
ten digits are told apart, without being told of which task one is.

    naive      one adapter and one head go on from task to task
    surgery    an adapter for each task, which begins as the last one and is pulled to the mean of the earlier ones once
               after each optimiser step (the retention of that name); statistics of classes add up over sites, and the
               head is aligned on samples of their Gaussians; the adapter of an input is retrieved, refined by the model
               (MOS, arXiv 2412.09441, without its contrast of features and its sum of two predictions)

Beside them: `prototypes`, the nearest class mean of the bare backbone, which is the first guess; `told`, surgery where
the task of each input is known; and `unpulled`, surgery without the pull.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.methods import Adapter, Method, make
from offsite.emulator.retention.surgery import Surgery as Pull
from offsite.emulator.routing.alignment import align
from offsite.emulator.routing.retrieval import Retrieval, refine
from offsite.kernels.classes import ClassSums, class_sums
from offsite.kernels.cosines import cosines
from offsite.kernels.schema import Tensors

CLASSES, SITES, PULL = 10, 3, Pull(alpha=0.1)
TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
TASK_OF = torch.tensor([task for task, classes in enumerate(TASKS) for _ in classes])


@dataclass(frozen=True)
class Size:
    """How much is trained: steps of pre-training, and rounds and steps at each site for each task."""

    pretraining: int = 300
    rounds: int = 3
    steps: int = 12


@dataclass(frozen=True)
class Rows:
    """Images (n, 1, 8, 8) in 0 .. 1 and their labels (n,)."""

    images: Tensor
    labels: Tensor

    def of(self, classes: Sequence[int]) -> "Rows":
        """Return those of some classes."""
        return self.at(torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten())

    def at(self, rows: Tensor) -> "Rows":
        """Return those at some indices."""
        return Rows(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class State:
    """What a round begins from: an adapter and a head (C, d), (C,)."""

    adapter: Adapter
    weight: Tensor
    bias: Tensor


@dataclass
class World:
    """A backbone with places for an adapter, and the stream's rows: each site's, and those to measure on."""

    model: Any
    method: Method
    places: dict[int, int]
    start: Adapter
    sites: list[Rows]
    test: Rows
    size: Size
    seed: int

    def features(self, adapter: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Return (n, d) with an adapter in place of the model's own, which nothing changes."""
        live = self.method.named_parameters(self.model, self.places)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        values = {  # parameters, of which the modules ask for theirs; one that trains stays itself
            names[id(parameter)]: one if isinstance(one := adapter[key], nn.Parameter) else nn.Parameter(one, False)
            for key, parameter in live.items()
        }
        hidden: Tensor = torch.func.functional_call(self.model, values, (images,)).last_hidden_state
        return hidden[:, 0]

    def sums(self, adapter: Adapter, classes: Sequence[int]) -> ClassSums:
        """Return the statistics of some classes as the sites' sums have them."""
        with torch.no_grad():
            parts = [rows.of(classes) for rows in self.sites]
            return reduce(add, (class_sums(self.features(adapter, one.images), one.labels, CLASSES) for one in parts))

    def learn(self, last: State, task: int, pull: Pull, anchor: Tensors) -> State:
        """Return what a task's rounds make of a state; each step is pulled to the anchor, if there is one."""
        for number in range(self.size.rounds):
            counts = torch.tensor([float(len(rows.of(TASKS[task]).labels)) for rows in self.sites])
            done = [self._site(last, site, task, number, pull, anchor) for site in range(SITES)]
            shares = (counts / counts.sum()).tolist()
            last = State(
                {key: sum(w * one.adapter[key] for w, one in zip(shares, done, strict=True)) for key in last.adapter},
                sum(w * one.weight for w, one in zip(shares, done, strict=True)),
                sum(w * one.bias for w, one in zip(shares, done, strict=True)),
            )
        return last

    def _site(self, last: State, site: int, task: int, number: int, pull: Pull, anchor: Tensors) -> State:
        rows, classes = self.sites[site].of(TASKS[task]), torch.tensor(TASKS[task])
        draw = torch.Generator().manual_seed(1000 * self.seed + 100 * task + 10 * number + site)
        adapter = {key: nn.Parameter(tensor.clone()) for key, tensor in last.adapter.items()}
        head = [last.weight.clone().requires_grad_(), last.bias.clone().requires_grad_()]
        optimizer = torch.optim.Adam([{"params": [*adapter.values()], "lr": 3e-3}, {"params": head, "lr": 1e-2}])
        for _ in range(self.size.steps):
            batch = rows.at(torch.randint(len(rows.labels), (32,), generator=draw))
            logits = functional.linear(self.features(adapter, batch.images), *head)[:, classes]
            loss = functional.cross_entropy(logits, torch.searchsorted(classes, batch.labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if anchor:
                pull.pull(adapter, anchor)
        return State({key: one.detach() for key, one in adapter.items()}, head[0].detach(), head[1].detach())

    def accuracy(self, classes: Tensor) -> float:
        """Return the share of the test's rows with these classes."""
        return float((classes == self.test.labels).float().mean())


@dataclass(frozen=True)
class Surgery:
    """An adapter for each task, a head for all, and what retrieval begins with: class means of the bare backbone."""

    adapters: list[Adapter]
    weight: Tensor
    bias: Tensor
    means: Tensor

    def first(self, world: World, images: Tensor) -> Tensor:
        """Return the class (n,) whose mean is nearest by cosine."""
        with torch.no_grad():
            return cosines(world.features(world.start, images), self.means).argmax(dim=1)

    def predict(self, world: World, images: Tensor, task: int) -> Tensor:
        """Return logits (n, C) with the adapter of a task."""
        with torch.no_grad():
            return functional.linear(world.features(self.adapters[task], images), self.weight, self.bias)

    def retrieve(self, world: World, images: Tensor) -> Retrieval:
        """Return classes with the adapters that they ask for."""
        return refine(self.first(world, images), TASK_OF, lambda task, rows: self.predict(world, images[rows], task))


@dataclass(frozen=True)
class Backbone:
    """A model that has learned upright digits from half of the images, its head, that half, and the other one."""

    model: Any
    head: nn.Module
    learned: Rows
    other: Rows


def backbone(seed: int, steps: int) -> Backbone:
    """Return a ViT of four layers of 64 channels, trained for so many steps."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    rows = Rows(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    upright, other = rows.at(order[: len(order) // 2]), rows.at(order[len(order) // 2 :])
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    model: Any = transformers.ViTModel(config, add_pooling_layer=False)
    head = nn.Linear(64, CLASSES)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = upright.at(torch.randint(len(upright.labels), (64,), generator=draw))
        loss = functional.cross_entropy(head(model(batch.images).last_hidden_state[:, 0]), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Backbone(model.eval().requires_grad_(False), head, upright, other)


def world(seed: int, size: Size) -> World:
    """Return a backbone that has learned upright digits, and the stream of others, turned over and inverted."""
    of = backbone(seed, size.pretraining)
    stream = Rows(1 - of.other.images.transpose(2, 3), of.other.labels)
    method = make("bottleneck", {"width": 8, "form": "parallel", "activation": "relu", "modules": "mlp-output"})
    places = {at: at for at in range(4)}
    start = method.start(of.model, places, seed=seed)
    model = method.attach(of.model, places, start)
    cut = 2 * len(stream.labels) // 3
    sites = [stream.at(torch.arange(cut)[site::SITES]) for site in range(SITES)]
    return World(model, method, places, start, sites, stream.at(torch.arange(cut, len(stream.labels))), size, seed)


def begun(of: World) -> State:
    """Return an adapter that changes nothing and a head of zeros."""
    return State(of.start, torch.zeros(CLASSES, 64), torch.zeros(CLASSES))


def naive(of: World) -> State:
    """Return what one adapter and one head are after all tasks."""
    return reduce(lambda last, task: of.learn(last, task, PULL, {}), range(len(TASKS)), begun(of))


def surgery(of: World, pull: Pull = PULL) -> Surgery:
    """Return what model surgery makes of the stream."""
    last, adapters, remembered = begun(of), list[Adapter](), dict[str, Tensors]()
    bare, sums, schema = list[ClassSums](), list[ClassSums](), of.method.schema(of.start)
    for task, classes in enumerate(TASKS):
        anchor = pull.anchor(last.adapter, schema, remembered) if adapters else {}
        last = of.learn(last, task, pull, anchor)
        adapters.append(last.adapter)
        remembered = pull.remember(last.adapter, schema, remembered)
        bare.append(of.sums(of.start, classes))
        sums.append(of.sums(last.adapter, classes))
        weight, bias = align(last.weight, last.bias, reduce(add, sums), seed=of.seed)
        last = State(last.adapter, weight, bias)
    return Surgery(adapters, last.weight, last.bias, reduce(add, bare).means().float())


def measure(seed: int, size: Size) -> dict[str, float]:
    """Return the accuracies over all ten digits of one seed, and how retrieval went."""
    of = world(seed, size)
    plain, done, bare = naive(of), surgery(of), surgery(of, Pull(alpha=0.0))
    images = of.test.images
    with torch.no_grad():
        logits = functional.linear(of.features(plain.adapter, images), plain.weight, plain.bias)
    found = done.retrieve(of, images)
    tasks = TASK_OF[of.test.labels]
    told = torch.stack([done.predict(of, images, task) for task in range(len(TASKS))])[tasks, torch.arange(len(tasks))]
    return {
        "naive": of.accuracy(logits.argmax(dim=1)),
        "surgery": of.accuracy(found.classes),
        "unpulled": of.accuracy(bare.retrieve(of, images).classes),
        "prototypes": of.accuracy(done.first(of, images)),
        "told": of.accuracy(told.argmax(dim=1)),
        "task": float((found.tasks == tasks).float().mean()),
        "settled": float(found.settled.float().mean()),
        "passes": float(found.passes),
    }


def main() -> None:
    """Measure seeds, and print each and their mean as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    size = Size()
    for name, value in vars(size).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    seeds = arguments.pop("seeds")
    rows = [measure(seed, Size(**arguments)) for seed in seeds]
    for seed, row in zip(seeds, rows, strict=True):
        print(json.dumps({"seed": seed} | {name: round(value, 3) for name, value in row.items()}))
    print(json.dumps({name: round(statistics.mean(row[name] for row in rows), 3) for name in rows[0]}))


if __name__ == "__main__":
    main()
