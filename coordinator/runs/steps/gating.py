"""Holding a run's outcome against its gate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offsite.coordinator import gates
from offsite.coordinator.gates.licence import stated
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.evaluation import EVALUATION_BATCH, device
from offsite.coordinator.runs.steps.inputs import folders, here, samples, the_base
from offsite.coordinator.runs.steps.orders import Gate
from offsite.coordinator.runs.steps.results import Verdict
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.emulator import methods, modality, objectives, zoo
from offsite.emulator.examples import collect
from offsite.emulator.modality import Sample
from offsite.emulator.plug import plug_all
from offsite.emulator.precision import DTYPES
from offsite.protos.figures import Score
from offsite.protos.ranges import finite


def gate(node: Node, spec: Grant, order: Gate) -> Verdict:
    """Measure the base and the plug-in on the probes that the checks of a gate read, and have these judge.

    Of an ensemble of which one answers, it is the newest adapter. Raises ValueError for probes that cannot be read.
    """
    timeline, source = Timeline(), the_base(node, spec, order.base)
    checks = gates.make(spec.gate)
    with timeline.span("loading"):
        model, tokenizer = zoo.load_base(source, dtype=DTYPES[spec.training.precision])
        probes = {name: samples(node, spec, spec.probes[name], tokenizer) for one in checks for name in one.texts}
        probes |= {name: _pairs(node, spec, name, tokenizer) for one in checks for name in one.pairs}
    with timeline.span("evaluation"):
        base = {name: _scores(model.to(device()), rows) for name, rows in probes.items()}
    with timeline.span("loading"):
        adapters = memory.experts(node.blobs(), spec, order)
        if memory.combine(spec) == "route":
            adapters = dict([*adapters.items()][:1])
        plugged = plug_all(model, methods.make(spec.method.name, spec.method.settings), adapters)
    with timeline.span("evaluation"):
        tuned = {name: _scores(plugged.to(device()), rows) for name, rows in probes.items()}
    figures = {name: float("nan") if value is None else value for name, value in order.figures.items()}
    evidence = gates.Evidence(figures, base, tuned, stated(Path(source)))
    return Verdict(findings=tuple(one.judge(evidence) for one in checks), spans=tuple(timeline))


def _pairs(node: Node, spec: Grant, name: str, tokenizer: Any) -> list[Sample]:
    """Read a probe of two answers each; return the samples of both, one after the other."""
    compare, kind = objectives.make("dpo", {}), modality.default()
    reading = collect(
        Path(here(node, spec, spec.probes[name])), compare.reader(kind), folders=folders(spec), odd_rows="refuse"
    )
    encoding = compare.encode(kind, reading.examples, tokenizer, max_length=spec.training.max_length, odd_rows="refuse")
    return [one for pair in encoding.samples for one in (pair.own, pair.other)]


def _scores(model: nn.Module, rows: Sequence[Sample]) -> list[Score]:
    """Return the score of each row."""
    model.eval()
    scores: list[Score] = []
    with torch.no_grad():
        for start in range(0, len(rows), EVALUATION_BATCH):
            part = rows[start : start + EVALUATION_BATCH]
            batch = modality.collate(part).to(next(model.parameters()).device)
            likely = modality.likelihoods(model, batch).tolist()
            scores += [
                Score(nll=finite(-nats), tokens=modality.collate([row]).targets)
                for row, nats in zip(part, likely, strict=True)
            ]
    return scores
