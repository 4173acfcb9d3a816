"""Tuning the base itself, as only its owner can: what a plug-in is compared with."""

import shutil
from dataclasses import replace

import torch

from offsite.coordinator.bound import of_base, tuned
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.evaluation import exams, measure
from offsite.coordinator.runs.steps.inputs import samples, the_base, unfinished
from offsite.coordinator.runs.steps.orders import Tune
from offsite.coordinator.runs.steps.results import Evaluation
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.emulator import methods, zoo
from offsite.emulator.precision import DTYPES


def tune(node: Node, spec: Grant, order: Tune) -> Evaluation:
    """Tune the base as the sites tune the emulator, for as many steps as an attack has, and measure it.

    It trains on the owner's text of the task, as an attack does. Killed, it goes on where it was.
    """
    timeline = Timeline()
    scratch = unfinished(node, spec, f"tune {order.base}")
    with timeline.span("loading"):
        base, tokenizer = zoo.load_base(the_base(node, spec, order.base), dtype=DTYPES[spec.training.precision])
        base.to("cuda" if torch.cuda.is_available() else "cpu")
        text, held_out = samples(node, spec, spec.attack_text, tokenizer), exams(node, spec, tokenizer)
    choice = of_base(spec.method)
    with timeline.span("training"):
        model = tuned(
            base,
            methods.make(choice.name, choice.settings),
            {layer: layer for layer in order.trainable},
            text,
            replace(spec.training, steps=spec.attack_steps),
            state=scratch / "state.safetensors",
        )
    scores = measure(model, held_out, timeline)
    shutil.rmtree(scratch, ignore_errors=True)
    return Evaluation(sets=scores, spans=tuple(timeline))
