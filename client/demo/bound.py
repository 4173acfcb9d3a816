"""The bound: the same method, trained on the base itself with all sites' data pooled, for as many steps in all.

Nobody could do this in earnest: it needs the model and the data in one place. The demo has both on one machine, and
does it to show how much of what could be gained the plug-in gains. It runs as a process of its own:
`python -m offsite.client.demo.bound JOB.json OUT.json`, which prints a JSON line for each step.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offsite.protos.documents import document, from_json, to_plain
from offsite.protos.spec import Name, Positive, RunSpec, Span

EVALUATION_BATCH = 8


@document
class BoundJob:
    """What to train and what to measure; paths are absolute."""

    spec: RunSpec
    trainable: tuple[int, ...]  # the layers that trained at the sites
    data: dict[Name, str]  # every site's training examples
    steps: Positive  # those of all sites and rounds together


def measure(job: BoundJob, *, tell: Callable[[int, float], None]) -> dict[str, Any]:
    """Train and evaluate; return {"sets": {name: {nll, tokens}}, "spans"}; `tell` gets each step and its loss."""
    from offsite.client.site.engines import ENGINES, join
    from offsite.client.site.job import EngineSpec
    from offsite.client.site.training import DTYPES
    from offsite.emulator import methods, zoo
    from offsite.emulator.batches import encode, evaluation_batches, training_batches
    from offsite.emulator.builders.base import Outline
    from offsite.emulator.examples import read
    from offsite.emulator.fidelity import likelihood

    marks = [time.time()]
    training, engine_spec = job.spec.training, EngineSpec(name="plain")
    model, tokenizer = zoo.load_base(
        zoo.locate(job.spec.model, cache=zoo.cache_folder()), dtype=DTYPES[training.precision]
    )
    outline = Outline(layers=tuple(range(model.config.num_hidden_layers)), trainable=job.trainable)
    method = methods.make(job.spec.method.name, job.spec.method.settings)
    model = method.attach(model, outline.places, method.start(model, outline.places, seed=training.seed))
    trained = method.named_parameters(model, outline.places)
    ranks = join(engine_spec, Path(os.devnull))
    engine = ENGINES[engine_spec.name](model, trained, training, engine_spec, ranks)
    pooled = [example for path in job.data.values() for example in read(Path(path))]
    batches = training_batches(
        encode(pooled, tokenizer, max_length=training.max_length),
        batch_size=training.batch_size,
        steps=job.steps,
        first_step=0,
        seed=training.seed,
    )
    marks.append(time.time())
    model.train()
    for step, batch in enumerate(batches, start=1):
        tell(step, engine.step(batch))
    marks.append(time.time())
    sets = {}
    for name, path in sorted(job.spec.evaluation.items()):
        encoded = encode(read(Path(path)), tokenizer, max_length=training.max_length)
        found = likelihood(model, evaluation_batches(encoded, batch_size=EVALUATION_BATCH))
        sets[name] = {"nll": found.nll, "tokens": found.tokens}
    marks.append(time.time())
    spans = [
        Span(kind="loading", start=marks[0], end=marks[1]),
        Span(kind="training", start=marks[1], end=marks[2]),
        Span(kind="evaluation", start=marks[2], end=marks[3]),
    ]
    return {"sets": sets, "spans": [to_plain(span) for span in spans]}


def main(job: Path, out: Path) -> None:
    """Do a job and write what it gave."""

    def tell(step: int, loss: float) -> None:
        print(json.dumps({"event": "step", "step": step, "loss": loss}), flush=True)

    gave = measure(from_json(BoundJob, job.read_bytes(), where=str(job)), tell=tell)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(gave))
    partial.replace(out)
    print(json.dumps({"event": "done"}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
