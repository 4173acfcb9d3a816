"""Attacking the emulator, as a site could."""

import copy
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from offsite.coordinator.attacks import of_run, scored
from offsite.coordinator.bundles.stored import open_bundle
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.evaluation import exams, measure
from offsite.coordinator.runs.steps.inputs import samples, unfinished
from offsite.coordinator.runs.steps.orders import Attack
from offsite.coordinator.runs.steps.results import Attacked, Attacks, Evaluation
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.store.finished import Finished
from offsite.emulator import bundle, methods
from offsite.emulator.evaluation.attack import Attacker, Start
from offsite.emulator.precision import DTYPES
from offsite.protos import tensors
from offsite.protos.documents import to_plain
from offsite.protos.figures import perplexity


def attack(node: Node, spec: Grant, order: Attack) -> Attacks:
    """Train all of the emulator in several ways, on public text and the owner's text of the task, and measure each.

    It trains on no text that is measured on. Killed, it goes on with the attacks that are left.
    """
    timeline = Timeline()
    scratch = unfinished(node, spec, f"attack {order.manifest} {order.adapter}")
    with timeline.span("loading"), TemporaryDirectory(dir=node.scratch) as folder:
        dtype = DTYPES[spec.training.precision]
        listed, emulator, tokenizer = open_bundle(node.blobs(), order.manifest, Path(folder), dtype=dtype)
        emulator.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        places, method = bundle.described(listed).outline.places, methods.make(spec.method.name, spec.method.settings)
        tuned = method.attach(copy.deepcopy(emulator), places, tensors.load(node.blobs().path(order.adapter)))
    models: dict[Start, nn.Module] = {"emulator": emulator, "tuned": tuned}

    task, public = (
        [] if not text else samples(node, spec, text, tokenizer) for text in (spec.attack_text, spec.public)
    )
    held_out = exams(node, spec, tokenizer)
    with timeline.span("training"):
        scores = scored(
            of_run(spec),
            Attacker(
                models,
                steps=spec.attack_steps,
                task=task,
                public=public,
                batch_size=spec.training.batch_size,
                seed=spec.training.seed,
                state=scratch / "state",
            ),
            lambda model: Evaluation(sets=measure(model, held_out, timeline)),
            cls=Evaluation,
            finished=Finished(scratch / "scores"),
            depends=to_plain(order),
        )
    shutil.rmtree(scratch, ignore_errors=True)
    attacks = [Attacked(name=one.name, sets=score.sets) for one, score in scores.items()]
    attacks.sort(key=_reached)
    return Attacks(attacks=tuple(attacks), spans=tuple(timeline))


def _reached(one: Attacked) -> tuple[bool, float]:
    """Order attacks by perplexity, those that have none last."""
    value = perplexity(one.sets.values())
    return math.isnan(value), value
