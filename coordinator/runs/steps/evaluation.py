"""Measuring the base or the emulator on the owner's held-out data."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from offsite.coordinator.bundles.stored import open_bundle
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.inputs import samples, the_base
from offsite.coordinator.runs.steps.orders import Evaluate
from offsite.coordinator.runs.steps.results import Evaluation
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.emulator import bundle, methods, modality, zoo
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.ensemble import Ensemble, twin
from offsite.emulator.methods import Method
from offsite.emulator.modality import Batch
from offsite.emulator.plug import plug_all
from offsite.emulator.precision import DTYPES
from offsite.emulator.routing.tasks import Tasks
from offsite.protos import tensors
from offsite.protos.figures import Score, total
from offsite.protos.ranges import finite

EVALUATION_BATCH = 8


def evaluate(node: Node, spec: Grant, order: Evaluate) -> Evaluation:
    """Measure the base or the emulator, with an adapter or without, on the owner's held-out data."""
    timeline = Timeline()
    blobs = node.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    if order.manifest is None and order.adapter is not None:
        return _plugged(node, spec, order, method)
    with timeline.span("loading"), TemporaryDirectory(dir=node.scratch) as scratch:
        adapter = tensors.load(blobs.path(order.adapter)) if order.adapter else None
        if order.manifest is None:
            model, tokenizer = zoo.load_base(the_base(node, spec, order.base), dtype=DTYPES[spec.training.precision])
        else:
            listed, model, tokenizer = open_bundle(
                blobs, order.manifest, Path(scratch), dtype=DTYPES[spec.training.precision]
            )
            if adapter is not None:
                model = method.attach(model, bundle.described(listed).outline.places, adapter)
        model.to(device()).eval()
    scores = measure(model, exams(node, spec, tokenizer, sets=order.sets), timeline)
    return Evaluation(sets=scores, spans=tuple(timeline))


def _plugged(node: Node, spec: Grant, order: Evaluate, method: Method) -> Evaluation:
    """Measure the base with what a version answers by.

    Of an ensemble also each expert alone. Where one of several is chosen, a row is measured by that of the task that it
    is most like, if tasks are known by their data, and else a set by that of its name, or the newest one.
    """
    timeline, blobs, scores = Timeline(), node.blobs(), dict[str, Score]()
    with timeline.span("loading"):
        base, tokenizer = zoo.load_base(the_base(node, spec, order.base), dtype=DTYPES[spec.training.precision])
        adapters = memory.experts(blobs, spec, order)
    texts = exams(node, spec, tokenizer, sets=order.sets)
    if memory.combine(spec) == "route" and len(adapters) > 1:
        known = memory.tasks(blobs, spec, order)
        for name, batches in texts.items():
            parts = _by_data(known, batches) if known else {name if name in adapters else [*adapters][0]: batches}
            part_scores = []
            for task, part in parts.items():
                model = plug_all(twin(base, range(len(layers(base)))), method, {task: adapters[task]})
                part_scores.append(measure(model.to(device()).eval(), {name: part}, timeline)[name])
            scores[name] = total(part_scores)
        return Evaluation(sets=scores, spans=tuple(timeline))
    with timeline.span("loading"):
        model = plug_all(base, method, adapters).to(device()).eval()
    scores = measure(model, texts, timeline)
    alone = {}
    if isinstance(model, Ensemble):
        alone = {name: measure(one, texts, timeline) for name, one in zip(model.names, model.experts, strict=True)}
    return Evaluation(sets=scores, experts=alone, spans=tuple(timeline))


def _by_data(known: Tasks, batches: list[Batch]) -> dict[str, list[Batch]]:
    """Return rows by the task that each is most like."""
    parts = known.apart(batches)
    return {task: evaluation_batches(parts[task], batch_size=EVALUATION_BATCH) for task in sorted(parts)}


def device() -> str:
    """Return where models compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
