"""Measuring the base or the emulator on the owner's held-out data."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from offsite.coordinator.bundles.stored import open_bundle, recovered
from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.inputs import folders, the_base
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.emulator import bundle, methods, zoo
from offsite.emulator.batches import encode, evaluation_batches
from offsite.emulator.examples import read
from offsite.emulator.likelihood import likelihood
from offsite.emulator.plug import plug
from offsite.emulator.precision import DTYPES
from offsite.protos import tensors

EVALUATION_BATCH = 8


def evaluate(
    home: Home, spec: Grant, *, base: str, manifest: str | None, exact: str | None, recovery: str | None = None
) -> dict[str, Any]:
    """Measure the base (manifest None) or the emulator, with an adapter or without, on the owner's held-out data."""
    timeline = Timeline()
    blobs = home.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    with timeline.span("loading"), TemporaryDirectory(dir=home.scratch) as scratch:
        if manifest is None:
            model, tokenizer = zoo.load_base(the_base(spec, base), dtype=DTYPES[spec.training.precision])
            if exact is not None:
                adapter = recovered(blobs, method, tensors.load(blobs.path(exact)), recovery)
                model = plug(model, method, adapter)
        else:
            listed, model, tokenizer = open_bundle(
                blobs, manifest, Path(scratch), dtype=DTYPES[spec.training.precision]
            )
            if exact is not None:
                places = bundle.described(listed).outline.places
                model = method.attach(model, places, tensors.load(blobs.path(exact)))
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    figures: dict[str, dict[str, float]] = {}
    for name, path in sorted(spec.evaluation.items()):
        batches = evaluation_batches(
            encode(read(Path(path), folders=folders(spec)), tokenizer, max_length=spec.training.max_length),
            batch_size=EVALUATION_BATCH,
        )
        with timeline.span("evaluation"):
            found = likelihood(model, batches)
        figures[name] = {"nll": found.nll, "tokens": found.tokens}
    return {"sets": figures, "spans": timeline}
