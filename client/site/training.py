"""One task's training: from a bundle, a broadcast adapter and the site's data to a trained adapter and its metrics."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offsite.client.site.engines import ENGINES, join
from offsite.client.site.inspection import BATCHES, judge, own_start, receive, strange_start
from offsite.client.site.job import TrainerJob
from offsite.client.site.reasons import because
from offsite.emulator import bundle, examples, methods
from offsite.emulator.batches import Encoded, collate, encoded, schedule
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.methods.proof import Witness
from offsite.emulator.precision import DTYPES
from offsite.protos import tensors
from offsite.protos.documents import canonical, to_json
from offsite.protos.errors import InputError, MismatchError, OffsiteError, RunError
from offsite.protos.spec import Span, TaskSpec, UpdateMetrics

SENTENCE = 300  # characters of a warning; events of several processes must not mix


def train(job: TrainerJob, *, say: Callable[..., None], rendezvous: Path) -> None:
    """Do this process's part of a job; the first rank writes what is sent. Raises OffsiteError and system errors."""
    started = time.time()
    task, spec = job.task, job.task.training
    with because("FAULT_ENGINE"):
        ranks = join(job.engine, rendezvous)
    _make_repeatable()
    with _faults("FAULT_DATA"):
        data = _read(job)  # before the model: it is quick, and the likeliest to be at fault
    with _faults("FAULT_EMULATOR"):
        ready = _load(job)
    with _faults("FAULT_DATA"):
        odd_rows = job.policy.odd_rows
        encoding = encoded(data.examples, ready.tokenizer, max_length=spec.max_length, odd_rows=odd_rows)
    sequences = encoding.sequences
    counts = {"examples": data.census.examples, "distinct": data.census.distinct, **encoding.counts}
    counts["left_out"] += sum(one.count for one in data.census.left_out)
    say("data", **counts, warnings=[told[:SENTENCE] for told in encoding.warnings[:4]])
    order = schedule(
        len(sequences),
        batch_size=spec.batch_size,
        steps=spec.steps,
        first_step=task.round * spec.steps,
        seed=spec.seed,
    )
    kinds: dict[Encoded, int] = {}
    kind = [kinds.setdefault(one, len(kinds)) for one in sequences]  # equal sequences are of one kind
    seen = len({kind[row] for rows in order for row in rows})
    job.policy.check_rows(task, seen=seen, distinct=len(kinds))
    if job.engine.whole:
        ready.model.to(ranks.device)
    looked_at = [collate([sequences[row] for row in rows]) for rows in order[:BATCHES]]
    verdict = judge(job, ready.model, looked_at, ready.places, signs=ready.signs)
    perplexity = verdict.perplexity if math.isfinite(verdict.perplexity) else None  # JSON has no infinity
    say("inspected", perplexity=perplexity, warnings=verdict.warnings)
    trained = ready.method.named_parameters(ready.model, ready.places)
    witness = Witness(trained)
    with because("FAULT_ENGINE"):
        engine = ENGINES[job.engine.name](ready.model, trained, spec, job.engine, ranks)
    ready.model.train()
    torch.manual_seed(spec.seed + task.round * ranks.world + ranks.rank)  # of dropout; different in each process
    losses: list[float] = []
    targets: list[int] = []
    loaded = time.time()
    for step, rows in enumerate(order, start=1):
        batch = collate([sequences[row] for row in rows])
        losses.append(engine.step(batch))
        targets.append(batch.targets)
        if step == 1:
            _prove(witness)
        if not math.isfinite(losses[-1]):
            what = f"the loss is {losses[-1]} at step {step} of {spec.steps}"
            raise RunError(f"{what}; a lower learning_rate may help", reason="FAULT_DIVERGED")
        say("step", step=step, steps=spec.steps, loss=losses[-1], tokens=batch.targets)
    adapter = engine.gather(ready.method, ready.places)
    if ranks.rank == 0:
        metrics = UpdateMetrics(
            examples=seen,
            tokens=sum(targets),
            loss=sum(map(mul, losses, targets)) / sum(targets),
            losses=tuple(losses) if job.policy.per_step_metrics else (),
            spans=(
                Span(kind="loading", start=started, end=max(started, loaded)),
                Span(kind="training", start=loaded, end=max(loaded, time.time())),
            ),
            engine=f"{job.engine.title}, {ranks.device.type}",
            peak_memory_bytes=_peak_memory_bytes(),
        )
        _write(adapter, ready.broadcast, metrics, task, Path(job.out))


def _read(job: TrainerJob) -> examples.Reading:
    folders = [Path(folder) for folder in job.policy.data]
    return examples.collect(Path(job.data), folders=folders, odd_rows=job.policy.odd_rows)


@dataclass(frozen=True)
class _Ready:
    """An emulator with the adapter that was sent in it, and what is suspicious about that adapter."""

    model: nn.Module
    tokenizer: Any
    method: Method
    places: dict[int, int]
    broadcast: Adapter
    signs: list[str]


def _load(job: TrainerJob) -> _Ready:
    """Read the bundle and the broadcast; raises ValueError, and MismatchError for a tensor that is not as agreed."""
    task, dtype = job.task, DTYPES[job.task.training.precision]
    layout = bundle.described(job.manifest)
    places = layout.outline.places
    model, tokenizer = bundle.load(Path(job.bundle), layout=layout, dtype=dtype)
    method = methods.make(task.method.name, task.method.settings)
    start = own_start(Path(job.adapter), method, model, places, task)
    broadcast = receive(Path(job.adapter), start)
    signs = strange_start(broadcast, start, dtype) if task.round == 0 else []  # later ones are averages
    return _Ready(method.attach(model, places, broadcast), tokenizer, method, places, broadcast, signs)


@contextmanager
def _faults(reason: str, kind: type[OffsiteError] = InputError) -> Iterator[None]:
    """Call what the emulator package calls a ValueError by its kind: a fault of the files that are read, or another."""
    with because(reason):
        try:
            yield
        except ValueError as error:
            raise kind(str(error)) from error


def _prove(witness: Witness) -> None:
    """Raise MismatchError if a trained tensor does not train: the emulator is not what was agreed."""
    with _faults("FAULT_EMULATOR", MismatchError):
        witness.judge()


def _make_repeatable() -> None:
    """Have the same job give the same bytes, on a GPU too where torch can."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by a property


def _write(adapter: Adapter, broadcast: Adapter, metrics: UpdateMetrics, task: TaskSpec, out: Path) -> None:
    """Write the adapter after training beside its metrics, each whole or not at all; raises MismatchError."""
    for key, start in broadcast.items():
        found = tuple(adapter[key].shape) if key in adapter else None
        if found != tuple(start.shape):
            raise MismatchError(f"after training, tensor {key} has shape {found}, expected {tuple(start.shape)}")
        if not bool(torch.isfinite(adapter[key]).all()):
            what = f"after training, tensor {key} holds values that are not finite"
            raise MismatchError(what, reason="FAULT_DIVERGED")
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "metrics.json.partial"
    partial.write_bytes(to_json(metrics))
    partial.replace(out / "metrics.json")
    about = {
        "format": 1,
        "run": task.run,
        "round": task.round,
        "site": task.site,
        "attempt": task.attempt,
        "broadcast": task.adapter,
        "method_hash": task.method_hash,
    }
    # One entry, because safetensors writes several in random order and the same work must give the same bytes.
    tensors.save(out / "update.safetensors", adapter, metadata={"offsite": canonical(about).decode()})


def _peak_memory_bytes() -> int:
    """Most memory this process has had resident; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
