"""What takes all sites' data in one place: the bound of what could be gained, and the attack on the emulator.

The bound is the same method, trained on the base itself for as many steps as all sites together; in earnest nobody has
the model and the data in one place. The attack is what the sites could do if they joined: they unfreeze all of the
emulator that they hold and train that, on the same data and for as many steps. Each runs as a process of its own,
`python -m offsite.client.demo.pooled JOB.json OUT.json`, which prints a JSON line for each step.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from offsite.protos.documents import document, from_json, to_plain
from offsite.protos.ranges import Name, Positive, finite
from offsite.protos.spec import LocalTraining, Manifest, RunSpec, Span

EVALUATION_BATCH = 8


@document
class PooledJob:
    """What to train and what to measure; paths are absolute."""

    what: Literal["bound", "attack"]
    spec: RunSpec
    training: LocalTraining  # as the sites trained
    manifest: Manifest
    bundle: str  # a site's copy of the emulator
    data: dict[Name, str]  # every site's training examples
    steps: Positive  # those of all sites and rounds together


def measure(job: PooledJob, *, tell: Callable[[int, float], None]) -> dict[str, Any]:
    """Train and evaluate; return {"sets": {name: {nll, tokens}}, "spans"}; `tell` gets each step and its loss."""
    from offsite.emulator import bundle, zoo
    from offsite.emulator.batches import encode, evaluation_batches
    from offsite.emulator.examples import read
    from offsite.emulator.likelihood import likelihood
    from offsite.emulator.precision import DTYPES

    marks = [time.time()]
    training = job.training
    dtype = DTYPES[training.precision]
    if job.what == "attack":
        model, tokenizer = bundle.load(Path(job.bundle), layout=bundle.described(job.manifest), dtype=dtype)
    else:
        model, tokenizer = zoo.load_base(zoo.locate(job.spec.model, cache=zoo.cache_folder()), dtype=dtype)
    pooled = [example for path in job.data.values() for example in read(Path(path))]
    encoded = encode(pooled, tokenizer, max_length=training.max_length)
    marks.append(time.time())
    model = (_attack if job.what == "attack" else _bound)(job, model, encoded, tell)
    marks.append(time.time())
    sets = {}
    for name, path in sorted(job.spec.evaluation.items()):
        exam = encode(read(Path(path)), tokenizer, max_length=training.max_length)
        found = likelihood(model, evaluation_batches(exam, batch_size=EVALUATION_BATCH))
        sets[name] = {"nll": finite(found.nll), "tokens": found.tokens}
    marks.append(time.time())
    spans = [
        Span(kind="loading", start=marks[0], end=max(marks[:2])),
        Span(kind="training", start=marks[1], end=max(marks[1:3])),
        Span(kind="evaluation", start=marks[2], end=max(marks[2:4])),
    ]
    return {"sets": sets, "spans": [to_plain(span) for span in spans]}


def _bound(job: PooledJob, model: Any, encoded: Any, tell: Callable[[int, float], None]) -> Any:
    """Train the base as a site trains the emulator."""
    from offsite.client.site.engines import ENGINES, join
    from offsite.client.site.job import EngineSpec
    from offsite.emulator import methods
    from offsite.emulator.batches import training_batches

    training, engine_spec = job.training, EngineSpec(name="plain")
    places = {layer: layer for layer in job.manifest.trainable}
    method = methods.make(job.spec.method.name, job.spec.method.settings)
    model = method.attach(model, places, method.start(model, places, seed=training.seed))
    trained = method.named_parameters(model, places)
    engine = ENGINES[engine_spec.name](model, trained, training, engine_spec, join(engine_spec, Path(os.devnull)))
    model.train()
    batches = training_batches(
        encoded, batch_size=training.batch_size, steps=job.steps, first_step=0, seed=training.seed
    )
    for step, batch in enumerate(batches, start=1):
        tell(step, engine.step(batch))
    return model


def _attack(job: PooledJob, model: Any, encoded: Any, tell: Callable[[int, float], None]) -> Any:
    """Train all of the emulator, at a rate that suits whole layers."""
    from offsite.emulator.evaluation.attack import RATE, attack
    from offsite.emulator.tuning.loop import Schedule
    from offsite.emulator.tuning.rates import suited

    training = job.training
    schedule = Schedule(job.steps, suited(RATE, model), batch_size=training.batch_size, seed=training.seed)
    return attack(model, encoded, schedule, tell=lambda step, _, loss: tell(step, loss))


def main(job: Path, out: Path) -> None:
    """Do a job and write what it gave."""

    def tell(step: int, loss: float) -> None:
        print(json.dumps({"event": "step", "step": step, "loss": loss}), flush=True)

    gave = measure(from_json(PooledJob, job.read_bytes(), where=str(job)), tell=tell)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(gave))
    partial.replace(out)
    print(json.dumps({"event": "done"}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
