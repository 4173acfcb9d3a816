"""The real model and real texts, and a tuning told in figures.

Seeds choose the examples, their order and what starts at random. By default one is run, in a size that is enough for
every order; docs/emulators.md has what OFFSITE_FULL=1 OFFSITE_SEEDS=0,1,2 pytest -m slow -s tests/smollm2 prints.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.client.demo import data
from offsite.emulator import builders, methods, modality, placements, zoo
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.builders import Material, crash
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.modality import Batch, encode, read
from offsite.emulator.modality.causal_text.encoding import Tokens
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Placement
from offsite.emulator.plug import plug
from offsite.emulator.precision import DTYPES, fastest
from offsite.emulator.tuning.loop import Schedule, tune

SEEDS = [int(seed) for seed in os.environ.get("OFFSITE_SEEDS", "0").split(",")]
Chain = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    steps: int
    haste: float  # times the learning rate that suits many steps
    length: int  # tokens of a sequence
    held_out: int  # examples of each of the four sites
    general: int  # public texts to measure on
    few: int  # public texts to read with and without rounding


SHORT, FULL = Size(12, 2.0, 64, 8, 16, 16), Size(20, 1.0, 96, 16, 24, 32)
SIZE = FULL if os.environ.get("OFFSITE_FULL") else SHORT


@dataclass
class Bench:
    """SmolLM2-135M, what four sites would have, their exam, and public text of which half is for measuring."""

    base: nn.Module
    tokenizer: Any
    train: list[Tokens]
    exam: list[Batch]
    public: list[Tokens]
    general: list[Batch]
    seed: int

    @cached_property
    def material(self) -> Material:
        return Material(batches=evaluation_batches(self.public, batch_size=8), samples=self.public)

    @property
    def few(self) -> list[Tokens]:
        return self.public[: SIZE.few]

    @cached_property
    def zero_shot(self) -> float:
        return self.perplexity(self.base)

    def perplexity(self, model: nn.Module, text: list[Batch] | None = None) -> float:
        return modality.score(model, text or self.exam).perplexity

    def draft(self, chain: Chain, placement: Placement | None = None) -> Draft:
        made = [builders.make(name, settings) for name, settings in chain]
        return builders.run(made, placement or placements.Ends(2, 2), self.base, self.material)

    def schedule(self, rate: float, batch_size: int = 4) -> Schedule:
        return Schedule(SIZE.steps, SIZE.haste * rate, batch_size=batch_size, decay="cosine", seed=self.seed)

    def unhurried(self, rate: float) -> Schedule:
        """That of the full size, whatever the size."""
        return Schedule(FULL.steps, rate, decay="cosine", seed=self.seed)

    def tuned(
        self, model: nn.Module, places: dict[int, int], method: Method, rate: float, batch_size: int = 4
    ) -> tuple[nn.Module, Adapter]:
        """Train a method on a copy of a model; return it, and what was trained."""
        twin = restack(model, range(len(layers(model))))
        twin = method.attach(twin, places, method.start(twin, places, seed=self.seed))
        tune(twin, method.named_parameters(twin, places), self.train, self.schedule(rate, batch_size))
        return twin, method.state(twin, places)

    def plugged(self, method: Method, adapter: Adapter) -> float:
        return self.perplexity(plug(copy.deepcopy(self.base), method, adapter))


@pytest.fixture(scope="session", params=SEEDS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    seed, folder, cache = int(request.param), tmp_path_factory.mktemp("texts"), zoo.cache_folder()
    sites = data.prepare(folder, cache=cache, examples=80, held_out=SIZE.held_out, seed=seed, exam=True)
    base, tokenizer = zoo.load_base(
        zoo.locate("smollm2-135m-instruct", cache=cache), DTYPES[fastest(torch.device("cpu"))]
    )

    def encoded(*files: Path) -> list[Tokens]:
        return encode(
            [example for file in files for example in read(file)], tokenizer, max_length=SIZE.length, divide=False
        )

    public = encoded(folder / "owner" / "public.jsonl")
    bench = Bench(
        base=base,
        tokenizer=tokenizer,
        train=encoded(*(site.train for site in sites)),
        exam=evaluation_batches(encoded(*(site.held_out for site in sites)), batch_size=8),
        public=public[:64],
        general=evaluation_batches(public[64 : 64 + SIZE.general], batch_size=8),
        seed=seed,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crash, "pooled", read_once(base))
        yield bench


def read_once(base: nn.Module) -> Callable[[nn.Module, Sequence[Batch]], Tensor]:
    """CRaSh's reading of a text, which each of its drafts would do again: that of the same batches is kept."""
    known: list[tuple[Sequence[Batch], Tensor]] = []

    def pooled(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
        kept = next((states for text, states in known if text is batches and model is base), None)
        if kept is None:
            kept = original(model, batches)
            known.append((batches, kept))
        return kept

    original = crash.pooled
    return pooled


@pytest.fixture(scope="session")
def blocks() -> Method:
    return methods.make("blocks", {})


@pytest.fixture
def tell(bench: Bench, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Print figures as one JSON line, for -s."""

    def say(**figures: float) -> None:
        rounded = {name: float(f"{value:.5g}") for name, value in figures.items()}
        print(json.dumps({"test": request.node.originalname, "seed": bench.seed} | rounded), flush=True)

    return say
