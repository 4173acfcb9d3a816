"""One task's training: from a bundle, a broadcast adapter and the site's data to a trained adapter and its metrics."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from offsite.client.site.engines import ENGINES, join
from offsite.client.site.job import TrainerJob
from offsite.client.site.proof import Witness
from offsite.emulator import bundle, examples, methods
from offsite.emulator.batches import collate, encode, schedule
from offsite.emulator.builders.base import Outline
from offsite.emulator.methods import Adapter
from offsite.protos import tensors
from offsite.protos.documents import canonical, to_json
from offsite.protos.errors import InputError, MismatchError, RunError
from offsite.protos.spec import Span, TaskSpec, UpdateMetrics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(job: TrainerJob, *, say: Callable[..., None], rendezvous: Path) -> None:
    """Do this process's part of a job; the first rank writes what is sent. Raises OffsiteError and system errors."""
    started = time.time()
    task, spec = job.task, job.task.training
    ranks = join(job.engine, rendezvous)
    _make_repeatable()
    broadcast = tensors.load(Path(job.adapter))
    outline = Outline(job.manifest.layers, job.manifest.trainable, job.manifest.shared)
    with _faults_of_input():
        data = examples.read(Path(job.data))  # before the model: it is quick, and the likeliest to be at fault
        model, tokenizer = bundle.load(Path(job.bundle), outline=outline, dtype=DTYPES[spec.precision])
        encoded = encode(data, tokenizer, max_length=spec.max_length)
        method = methods.make(task.method.name, task.method.settings)
        model = method.attach(model, outline.places, broadcast)
    trained = method.named_parameters(model, outline.places)
    witness = Witness(trained)
    engine = ENGINES[job.engine.name](model, trained, spec, job.engine, ranks)
    model.train()
    order = schedule(
        len(encoded),
        batch_size=spec.batch_size,
        steps=spec.steps,
        first_step=task.round * spec.steps,
        seed=spec.seed,
    )
    torch.manual_seed(spec.seed + task.round * ranks.world + ranks.rank)  # of dropout; different in each process
    losses: list[float] = []
    tokens = 0
    loaded = time.time()
    for step, rows in enumerate(order, start=1):
        batch = collate([encoded[row] for row in rows])
        losses.append(engine.step(batch))
        tokens += batch.targets
        if step == 1:
            witness.judge()
        if not math.isfinite(losses[-1]):
            raise RunError(f"the loss is {losses[-1]} at step {step} of {spec.steps}; a lower learning_rate may help")
        say("step", step=step, steps=spec.steps, loss=losses[-1], tokens=batch.targets)
    adapter = engine.gather(method, outline.places)
    if ranks.rank == 0:
        metrics = UpdateMetrics(
            examples=len({row for rows in order for row in rows}),
            tokens=tokens,
            losses=tuple(losses),
            spans=(
                Span(kind="loading", start=started, end=loaded),
                Span(kind="training", start=loaded, end=time.time()),
            ),
            engine=f"{job.engine.title}, {ranks.device.type}",
            peak_memory_bytes=_peak_memory_bytes(),
        )
        _write(adapter, broadcast, metrics, task, Path(job.out))


@contextmanager
def _faults_of_input() -> Iterator[None]:
    """What the emulator package calls a ValueError while files are read is a fault of the files."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


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
            raise MismatchError(f"after training, tensor {key} holds values that are not finite")
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
