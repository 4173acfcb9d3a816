"""What a step of each method costs, and how much it learns in as many steps, beside LoRA on the same model in one run.

    python tests/bench/methods.py [--methods 'lora' 'paca(rank=16)+ends(bottom=0, top=22)' ...] [--steps 12] [--seeds 1]
                                  [--out FOLDER]

The model is SmolLM2-135M in fp32; a method trains all layers, or those of the placement that its recipe adds. The texts
are those of the demo's four sites, 64 tokens at most. A step is one of AdamW on the four longest; the steps of all
methods take turns, and of each the least processor time counts. Memory is what a step holds beside the model's weights:
what is saved for the backward pass, and values, gradients and moments of what trains. The loss is that of held-out
answers after as many steps of 4 sequences, each method at its own learning rate: the mean over seeds of the start and
of the order of the texts. It is as good as LoRA's if it is at most LoRA's and a standard deviation of that over the
seeds. FOLDER gets a table, `methods.md`, and a plot, `methods.svg`.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from offsite.client.demo import data
from offsite.coordinator.comparison.plots import GOOD, INK, QUIET, STYLE
from offsite.emulator import methods, modality, placements, zoo
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.evaluation.cost import costs
from offsite.emulator.methods import Method
from offsite.emulator.methods.base import Choosing
from offsite.emulator.modality import Batch, collate, encode, read
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.protos.grammar import read_one

MODEL, LENGTH, ROWS, REPEATS = "smollm2-135m-instruct", 64, 4, 6
RECIPES = (
    *("lora", "dora", "paca", "paca(rank=16)", "s2ft", "s2ft(channels=0.1)", "mos", "hydra", "soka", "ssf"),
    *("bottleneck", "sara", "spiel", "ia3", "paca(rank=16)+ends(bottom=0, top=22)"),
)


@dataclass(frozen=True)
class Figures:
    """Those of one method."""

    values: int  # that train
    step_s: float  # processor time of a step
    saved: int  # bytes of activations for the backward pass
    memory: int  # these, and all that is held of what trains
    losses: tuple[float, ...]  # nats of a held-out target, by seed

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return mean(self.losses)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; of one there is none."""
        return stdev(self.losses) if len(self.losses) > 1 else 0.0

    def learns(self, yardstick: "Figures") -> bool:
        """Tell whether the loss is as good as another's."""
        return self.loss <= yardstick.loss + yardstick.spread


@dataclass(frozen=True)
class Candidate:
    """A method, and the layers that it trains."""

    method: Method
    places: dict[int, int]

    @classmethod
    def of(cls, recipe: str, depth: int) -> "Candidate":
        """Read a recipe of a method, or of one and a placement; raises ValueError."""
        (name, settings), *placement = read_one(recipe)
        if len(placement) > 1:
            raise ValueError(f"{recipe}: expected a method, or a method and a placement")
        (where, its) = placement[0] if placement else ("kept", {})
        trained = placements.make(where, its).choose(range(depth), depth)
        return cls(methods.make(name, settings), {layer: layer for layer in trained})

    def attached(self, base: nn.Module, first: Batch, *, seed: int) -> nn.Module:
        """Return a twin of the base, of the same tensors, with the method's start in it."""
        model, method = restack(base, range(len(layers(base)))), self.method
        model = method.attach(model, self.places, method.start(model, self.places, seed=seed))
        if isinstance(method, Choosing):
            method.choose(model, self.places, first)
        return model

    def live(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return what trains of such a model, and have nothing else train."""
        parameters = self.method.named_parameters(model, self.places)
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return parameters


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, each storage once, the model's own none."""
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = modality.loss(model, batch)
    del loss  # not before: what is alive has an address of its own
    return sum(kept.values())


def measure(recipes: Iterable[str], *, steps: int, seeds: int) -> dict[str, Figures]:
    """Measure each candidate that a recipe names."""
    cache = zoo.cache_folder()
    base, tokenizer = zoo.load_base(zoo.locate(MODEL, cache=cache), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        sites = data.prepare(Path(folder), cache=cache, examples=80, held_out=16, seed=0, exam=True)
        train, exam = (
            encode([row for file in files for row in read(file)], tokenizer, max_length=LENGTH, divide=False)
            for files in ([site.train for site in sites], [site.held_out for site in sites])
        )
    batch = collate(sorted(train, key=len)[-ROWS:])  # the longest
    held_out = evaluation_batches(exam, batch_size=8)
    first = evaluation_batches(train[:ROWS], batch_size=ROWS)[0]
    candidates = {recipe: Candidate.of(recipe, len(layers(base))) for recipe in recipes}
    models = {recipe: one.attached(base, first, seed=0) for recipe, one in candidates.items()}
    live = {recipe: one.live(models[recipe]) for recipe, one in candidates.items()}
    spent = costs({recipe: (models[recipe], live[recipe]) for recipe in candidates}, batch, repeats=REPEATS)
    figures: dict[str, Figures] = {}
    for recipe, one in candidates.items():
        values = sum(parameter.numel() for parameter in one.live(models[recipe]).values())
        saved, losses = saved_bytes(models.pop(recipe), batch), []
        for seed in range(seeds):
            model = one.attached(base, first, seed=seed)
            schedule = Schedule(steps, one.method.rate, batch_size=ROWS, decay="cosine", seed=seed)
            tune(model, one.live(model), train, schedule)
            losses.append(modality.score(model, held_out).mean)
        figures[recipe] = Figures(values, spent[recipe].cpu_s, saved, saved + 4 * 4 * values, tuple(losses))
        print(json.dumps({"method": recipe} | figures[recipe].__dict__), flush=True)
    print(json.dumps({"base": modality.score(base, held_out).mean}), flush=True)
    return figures


def table(figures: Mapping[str, Figures]) -> str:
    """Return the figures as a table in Markdown, with those of LoRA as the yardstick of costs."""
    lora = figures["lora"]
    lines = [
        "| method | values that train | held-out loss | CPU time of a step | saved for backward | memory of a step |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{name}` | {one.values:,} | {one.loss:.3f} ± {one.spread:.3f} | {one.step_s / lora.step_s:.2f} | "
        f"{one.saved / lora.saved:.2f} | {one.memory / lora.memory:.2f} |"
        for name, one in sorted(figures.items(), key=lambda item: item[1].step_s)
    ]
    return "\n".join(lines) + "\n"


def plot(figures: Mapping[str, Figures], file: Path) -> None:
    """Draw memory over time, both as shares of LoRA's; what learned as much as LoRA is filled."""
    lora = figures["lora"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for at, (name, one) in enumerate(sorted(figures.items(), key=lambda item: item[1].step_s)):
            x, y, good = one.step_s / lora.step_s, one.memory / lora.memory, one.learns(lora)
            axes.scatter(
                [x], [y], s=36, facecolor=GOOD if good else "none", edgecolor=GOOD if good else QUIET, zorder=3
            )
            axes.annotate(name, (x, y), xytext=(5, (3, -9)[at % 2]), textcoords="offset points", fontsize=7, color=INK)
        axes.axvline(0.75, color=QUIET, linewidth=0.8, linestyle=":")
        axes.axhline(0.65, color=QUIET, linewidth=0.8, linestyle=":")
        axes.set_xlabel("CPU time of a step, of LoRA's")
        axes.set_ylabel("memory of a step beside the weights, of LoRA's")
        says = "filled: a loss of at most LoRA's and a standard deviation over seeds; dotted: the aim"
        axes.set_title(says, fontsize=9, color=INK, loc="left")
        figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    """Measure, print a JSON line a method, and write the table and the plot if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(RECIPES), help="recipes; lora is always one of them")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for methods.md and methods.svg")
    asked = parser.parse_args()
    torch.manual_seed(0)
    figures = measure(dict.fromkeys(["lora", *asked.methods]), steps=asked.steps, seeds=asked.seeds)
    print(table(figures))
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "methods.md").write_text(table(figures))
        plot(figures, asked.out / "methods.svg")


if __name__ == "__main__":
    main()
