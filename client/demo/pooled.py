"""What takes all sites' data in one place: the bound of what could be gained, and the attack on the emulator.

The bound is the same method, trained on the base itself for as many steps as all sites together; in earnest nobody has
the model and the data in one place. The attack is what the sites could do if they joined: they unfreeze all of the
emulator that they hold and train that, on the same data. Where sites keep what they hold out, the first job measures on
it also what a coordinator never can: the base and the plug-in. Each of the two jobs runs as a process of its own,
`python -m offsite.client.demo.pooled JOB.json OUT.json`, which prints a JSON line for each step.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from offsite.client.site import curation
from offsite.protos.documents import document, from_json, to_plain
from offsite.protos.figures import BASE_TUNED, BASE_ZERO_SHOT, PLUG_IN, Score, perplexity
from offsite.protos.ranges import Count, Name, Place, Positive, finite
from offsite.protos.spec import LocalTraining, Manifest, RunSpec, Span

EVALUATION_BATCH = 8
What = Literal["bound", "attack"]
Tell = Callable[[int, int, float], None]  # step, of how many, its loss


@document
class Rows:
    """A site's rows: what it holds out by its secret, or what it has handed over of them."""

    train: Place
    apart: Count = 0  # of these
    secret: Place = ""
    exam: Place = ""


@document
class PooledJob:
    """What to train and what to measure; paths are absolute."""

    what: What
    spec: RunSpec
    training: LocalTraining  # as the sites trained
    manifest: Manifest
    bundle: str  # a site's copy of the emulator
    adapter: str  # the folder of the run's outcome
    rows: dict[Name, Rows]  # every site's
    steps: Positive  # those of all sites and rounds together


@document
class Pooled:
    """What a job measured on the rows that sites hold out: by figure, or by attack, the best of these first."""

    scores: dict[str, dict[Name, Score]]
    spans: tuple[Span, ...]


class Pool:
    """A job at work."""

    def __init__(self, job: PooledJob, tell: Tell) -> None:
        from offsite.emulator.precision import DTYPES

        self._job, self._tell = job, tell
        self._dtype = DTYPES[job.training.precision]
        self._spans: list[Span] = []

    def measure(self) -> Pooled:
        """Train and evaluate."""
        if self._job.what == "bound":
            return Pooled(scores=self._bound(), spans=tuple(self._spans))
        scores = self._attacks()
        best = sorted(scores, key=lambda name: perplexity(scores[name].values()))
        return Pooled(scores={name: scores[name] for name in best}, spans=tuple(self._spans))

    def _bound(self) -> dict[str, dict[str, Score]]:
        """Train the base as a site trains the emulator; before that, measure what no coordinator could."""
        from offsite.emulator import methods
        from offsite.emulator.plug import load
        from offsite.emulator.tuning.adapting import adapted

        job, rules = self._job, replace(self._job.training, steps=self._job.steps)
        model, tokenizer = self._base()
        trained, exams = self._samples(tokenizer)
        scores: dict[str, dict[str, Score]] = {}
        if any(site.apart for site in job.rows.values()):
            scores[BASE_ZERO_SHOT] = self._scores(model, exams)
            plugged, _ = self._base()
            scores[PLUG_IN] = self._scores(load(plugged, Path(job.adapter)), exams)
            del plugged
        with self._span("training"):
            places = {layer: layer for layer in job.manifest.trainable}
            method = methods.make(job.spec.method.name, job.spec.method.settings)
            model = adapted(model, method, places, trained, rules, tell=self._tell)
        return scores | {BASE_TUNED: self._scores(model, exams)}

    def _base(self) -> tuple[Any, Any]:
        """Load the base and its tokenizer."""
        import torch

        from offsite.emulator import zoo

        with self._span("loading"):
            source = zoo.locate(self._job.spec.model, cache=zoo.cache_folder())
            model, tokenizer = zoo.load_base(source, dtype=self._dtype)
            return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

    def _attacks(self) -> dict[str, dict[str, Score]]:
        """Train all of the emulator, begun as the sites have tuned it.

        Of the whole family (`offsite emulator compare`, `attack_steps` of a run) it is the one that has most when it
        begins, and costs least.
        """
        from offsite.emulator import bundle
        from offsite.emulator.evaluation.attack import Attack, Attacker
        from offsite.emulator.plug import load

        job, training = self._job, self._job.training
        with self._span("loading"):
            layout = bundle.described(job.manifest)
            emulator, tokenizer = bundle.load(Path(job.bundle), layout=layout, dtype=self._dtype)
            tuned = load(emulator, Path(job.adapter), layout.outline.places)
            samples, exams = self._samples(tokenizer)
        scores: dict[str, dict[str, Score]] = {}
        with self._span("training"):
            Attacker(
                {"tuned": tuned},
                steps=job.steps,
                task=samples,
                batch_size=training.batch_size,
                seed=training.seed,
                tell=lambda _, step, steps, loss: self._tell(step, steps, loss),
            ).make(
                [Attack("tuned", steps=job.steps)],
                lambda one, model: scores.update({one.name: self._scores(model, exams)}),
            )
        return scores

    def _scores(self, model: Any, exams: dict[str, list[Any]]) -> dict[str, Score]:
        from offsite.emulator import modality
        from offsite.emulator.batches import evaluation_batches

        scores = {}
        with self._span("evaluation"):
            for name, samples in sorted(exams.items()):
                score = modality.score(model, evaluation_batches(samples, batch_size=EVALUATION_BATCH))
                scores[name] = Score(nll=finite(score.total), tokens=score.count)
        return scores

    def _samples(self, tokenizer: Any) -> tuple[list[Any], dict[str, list[Any]]]:
        """Return what all sites train on together, and what each of them holds out."""
        from offsite.emulator import modality

        trained: list[Any] = []
        exams: dict[str, list[Any]] = {}
        for name, site in self._job.rows.items():
            own = modality.read(Path(site.train))
            if site.exam:
                held_out = modality.read(Path(site.exam))
            else:
                secret = Path(site.secret).read_bytes()
                own, held_out = curation.hold_out(own, count=site.apart, secret=secret)
            trained += own
            exams[name] = modality.encode(held_out, tokenizer, max_length=self._job.training.max_length)
        return modality.encode(trained, tokenizer, max_length=self._job.training.max_length), exams

    @contextmanager
    def _span(self, kind: Any) -> Iterator[None]:
        start = time.time()
        yield
        self._spans.append(Span(kind=kind, start=start, end=max(start, time.time())))


def main(job: Path, out: Path) -> None:
    """Do a job and write what it measured."""

    def tell(step: int, steps: int, loss: float) -> None:
        print(json.dumps({"event": "step", "step": step, "steps": steps, "loss": loss}), flush=True)

    pooled = Pool(from_json(PooledJob, job.read_bytes(), where=str(job)), tell).measure()
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(to_plain(pooled)))
    partial.replace(out)
    print(json.dumps({"event": "done"}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
