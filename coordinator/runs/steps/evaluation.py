"""Measuring the base or the emulator on the owner's held-out data."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from offsite.coordinator.bundles.stored import open_bundle, recovered
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.inputs import samples, the_base
from offsite.coordinator.runs.steps.orders import Evaluate
from offsite.coordinator.runs.steps.results import Evaluation
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.emulator import bundle, methods, modality, zoo
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.modality import Batch
from offsite.emulator.plug import plug
from offsite.emulator.precision import DTYPES
from offsite.protos import tensors
from offsite.protos.figures import Score
from offsite.protos.ranges import finite

EVALUATION_BATCH = 8


def evaluate(node: Node, spec: Grant, order: Evaluate) -> Evaluation:
    """Measure the base or the emulator, with an adapter or without, on the owner's held-out data."""
    timeline = Timeline()
    blobs = node.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    with timeline.span("loading"), TemporaryDirectory(dir=node.scratch) as scratch:
        adapter = tensors.load(blobs.path(order.adapter)) if order.adapter else None
        if order.manifest is None:
            model, tokenizer = zoo.load_base(the_base(node, spec, order.base), dtype=DTYPES[spec.training.precision])
            if adapter is not None:
                adapter = recovered(blobs, method, adapter, order.recovery)
                model = plug(model, method, adapter)
        else:
            listed, model, tokenizer = open_bundle(
                blobs, order.manifest, Path(scratch), dtype=DTYPES[spec.training.precision]
            )
            if adapter is not None:
                model = method.attach(model, bundle.described(listed).outline.places, adapter)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    scores = measure(model, exams(node, spec, tokenizer, sets=order.sets), timeline)
    return Evaluation(sets=scores, spans=tuple(timeline))


def exams(node: Node, spec: Grant, tokenizer: Any, *, sets: Sequence[str] = ()) -> dict[str, list[Batch]]:
    """Read the owner's held-out data by name, or some sets of it."""
    return {
        name: evaluation_batches(samples(node, spec, path, tokenizer), batch_size=EVALUATION_BATCH)
        for name, path in sorted(spec.evaluation.items())
        if not sets or name in sets
    }


def measure(model: nn.Module, exams: dict[str, list[Batch]], timeline: Timeline) -> dict[str, Score]:
    """Tell how well a model predicts each text."""
    scores: dict[str, Score] = {}
    for name, batches in exams.items():
        with timeline.span("evaluation"):
            measured = modality.score(model, batches)
        scores[name] = Score(nll=finite(measured.total), tokens=measured.count)
    return scores
