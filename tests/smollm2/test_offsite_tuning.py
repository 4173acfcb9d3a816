"""Offsite-Tuning's story on the real model, in inequalities that hold over three seeds.

The published orders, with bounds calibrated here: docs/emulators.md has the figures and their spread.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any

import pytest

from offsite.coordinator.runs.report import warnings
from offsite.emulator import modality
from offsite.emulator.evaluation.attack import RATE, attack
from offsite.emulator.evaluation.protection import Reach, protection
from offsite.emulator.methods import Method
from offsite.emulator.outline import Draft
from offsite.emulator.plug import plug

pytestmark = pytest.mark.slow
Tell = Callable[..., None]


@dataclass
class Story:
    """Offsite-Tuning's own: 2-20-2 layers, whole layers train."""

    draft: Draft
    emulator_zero_shot: float
    emulator_tuned: float
    plug_in: modality.Score
    base_tuned: float


@pytest.fixture(scope="module")
def story(bench: Any, blocks: Method) -> Story:
    draft = bench.draft([("uniform", {"keep": 24})])
    emulator, adapter = bench.tuned(draft.model, draft.outline.places, blocks, RATE)
    itself = {layer: layer for layer in draft.outline.trainable}
    bound, _ = bench.tuned(bench.base, itself, blocks, RATE)
    return Story(
        draft=draft,
        emulator_zero_shot=bench.perplexity(draft.model),
        emulator_tuned=bench.perplexity(emulator),
        plug_in=modality.score(plug(copy.deepcopy(bench.base), blocks, adapter), bench.exam),
        base_tuned=bench.perplexity(bound),
    )


def test_the_five_figures_stand_in_their_order(bench: Any, story: Story, tell: Tell) -> None:
    zero_shot, plug_in = bench.zero_shot, story.plug_in.perplexity
    recovered = log(zero_shot / plug_in) / log(zero_shot / story.base_tuned)
    gap = log(story.emulator_tuned / plug_in)
    tell(
        zero_shot=zero_shot,
        emulator_zero_shot=story.emulator_zero_shot,
        emulator_tuned=story.emulator_tuned,
        plug_in=plug_in,
        base_tuned=story.base_tuned,
        recovered=recovered,
        gap=gap,
    )
    assert story.base_tuned <= plug_in < zero_shot < story.emulator_tuned < story.emulator_zero_shot
    assert recovered >= 0.05 and gap >= 0.5


def test_unfreezing_closes_most_of_what_is_called_the_privacy_gap(bench: Any, story: Story, tell: Tell) -> None:
    """The same data with everything unfrozen, and an emulator healed on public text.

    Nothing hurries the first: at twice the rate that suits everything unfrozen, it would come to harm.
    """
    schedule = bench.schedule(RATE)
    attacked = {
        "unfreeze": attack(story.draft.model, bench.train, bench.unhurried(RATE)),
        "heal": attack(story.draft.model, bench.public, schedule),
    }
    found = {
        name: Reach(task=modality.score(model, bench.exam), general=modality.score(model, bench.general))
        for name, model in attacked.items()
    }
    plug_in, base = story.plug_in, modality.score(bench.base, bench.general)
    margin = log(found["unfreeze"].task.perplexity / plug_in.perplexity)
    gap = log(story.emulator_tuned / plug_in.perplexity)
    tell(
        margin=margin,
        gap=gap,
        unfreeze=found["unfreeze"].task.perplexity,
        unfreeze_general=found["unfreeze"].general.perplexity,
        heal=found["heal"].task.perplexity,
        heal_general=found["heal"].general.perplexity,
        base_general=base.perplexity,
    )
    assert margin < 0.7 * gap
    judged = protection(found, plug_in=plug_in, base=base, threshold=0.3)
    assert (judged.label == "protected") == (judged.margin >= 0.3)
    assert protection(found, plug_in=plug_in, base=base).label == "not protected"


def test_an_emulator_of_2_16_2_layers_is_called_unusable(bench: Any, tell: Tell) -> None:
    """Without distillation."""
    emulator = bench.perplexity(bench.draft([("uniform", {"keep": 20})]).model)
    tell(ratio=emulator / bench.zero_shot)
    (warning,) = warnings({"base_zero_shot": bench.zero_shot, "emulator_zero_shot": emulator})
    assert "too small to be useful" in warning


@pytest.mark.long
def test_clusters_of_20_layers_do_what_even_distances_need_24_for(
    bench: Any, story: Story, blocks: Method, tell: Tell
) -> None:
    draft = bench.draft([("crash", {"keep": 20})])
    _, adapter = bench.tuned(draft.model, draft.outline.places, blocks, RATE)
    plug_in = bench.plugged(blocks, adapter)
    uniform = story.plug_in.perplexity
    tell(plug_in=plug_in, uniform_24=uniform, ratio=plug_in / uniform)
    assert plug_in <= 1.05 * uniform and plug_in < bench.zero_shot
