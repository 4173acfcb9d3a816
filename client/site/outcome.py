"""What a trainer leaves for the agent to send: the adapter after training, packed by the stages, and its metrics."""

import resource
import sys
import time
from collections.abc import Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offsite.client.site import reservoir
from offsite.client.site.handout import Handout
from offsite.client.site.job import TrainerJob
from offsite.emulator import retention
from offsite.emulator.examples import Reading
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.parts import Turn
from offsite.emulator.parts.training import whole_schema
from offsite.emulator.retention import Rehearsing
from offsite.kernels.schema import Field, Schema, TensorMap
from offsite.protos import tensors, upload
from offsite.protos.documents import canonical, to_json
from offsite.protos.errors import MismatchError
from offsite.protos.security.draws import derive
from offsite.protos.spec import TaskSpec, UpdateMetrics
from offsite.protos.upload import Packed, Stage


def turn(task: TaskSpec) -> Turn:
    """Return the round of a task's site, from which the part that trains is drawn."""
    return Turn(task.training.seed, task.rounds_before + task.round, task.site)


def check(adapter: Adapter, broadcast: Adapter) -> None:
    """Raise MismatchError unless an adapter has the broadcast's tensors, all finite."""
    for key, start in broadcast.items():
        shape = tuple(adapter[key].shape) if key in adapter else None
        if shape != tuple(start.shape):
            raise MismatchError(f"after training, tensor {key} has shape {shape}, expected {tuple(start.shape)}")
        if not bool(torch.isfinite(adapter[key]).all()):
            what = f"after training, tensor {key} holds values that are not finite"
            raise MismatchError(what, reason="FAULT_DIVERGED")


def keep_rows(data: Reading, job: TrainerJob) -> None:
    """Write the rows that the site keeps of a task, where its retention rehearses them in later ones.

    Of a task that keeps none, a site that has some of earlier ones writes which those are, for the next one.
    """
    spec, continues = job.task.training, job.task.continues
    held = retention.make(spec.retention.name, spec.retention.settings)
    own = [example.row for example in data.examples]
    kept = held.sample(own, seed=spec.seed) if isinstance(held, Rehearsing) else []
    if kept or job.reservoirs:
        Path(job.out).mkdir(parents=True, exist_ok=True)
        reservoir.write(Path(job.out) / "reservoir.jsonl", kept, before=continues.run if continues else "")


def write(adapter: Adapter, metrics: UpdateMetrics, handout: Handout, job: TrainerJob) -> None:
    """Write the metrics, what stages leave out of the update, and the update: each whole or not at all, it the last.

    Packed a group at a time, the same job gives the same bytes. Raises InputError, ValueError where a stage cannot pack
    it, MismatchError where what was left out before is not of the task.
    """
    task, out = job.task, Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "metrics.json.partial"
    partial.write_bytes(to_json(metrics))
    partial.replace(out / "metrics.json")
    packing = Packing.of(task, handout.method, {**handout.broadcast, **adapter}, adapter)
    with ExitStack() as files:
        # One entry, because safetensors writes several in random order and the same work must give the same bytes.
        about = {"offsite": canonical(_about(task)).decode()}
        file, digest = out / "update.safetensors", out / "update.digest"
        send = files.enter_context(tensors.writing(file, packing.leaves, metadata=about, digest=digest))
        keep = None
        if packing.stays:
            keep = files.enter_context(tensors.writing(out / "residual.safetensors", packing.stays))
        residual: TensorMap = {}
        if job.residual:
            tensors.check(Path(job.residual), packing.stays, what="what was left out of the site's last update")
            residual = files.enter_context(tensors.reading(Path(job.residual)))
        secret = Path(job.secret).read_bytes()
        for packed in packing.pack(adapter, handout.broadcast, task, secret=secret, residual=residual):
            send(packed.update)
            if keep:
                keep(packed.residual)


@dataclass(frozen=True)
class Packing:
    """What an update of a task's tier is made of, before its stages and after."""

    stages: list[Stage]
    schema: Schema  # settled, of what of the adapter trains
    leaves: Schema  # of what leaves the site
    stays: Schema  # of what stages leave out of any part of the adapter, and feed back

    @classmethod
    def of(cls, task: TaskSpec, method: Method, adapter: Adapter, part: Container[str]) -> "Packing":
        """Ask the method and the stages, given a whole adapter of the tier and the keys of the part that trains.

        Raises InputError and ValueError as `write` does.
        """
        stages, whole = upload.make(task.upload), whole_schema(method, adapter)
        schema = {key: field for key, field in whole.items() if key in part}
        return cls(stages, schema, upload.schema_of(stages, schema), upload.residual_of(stages, whole))

    def pack(
        self, adapter: Adapter, broadcast: Adapter, task: TaskSpec, *, secret: bytes, residual: TensorMap
    ) -> Iterator[Packed]:
        """Yield what leaves the site and what stays, a group of tensors at a time; `secret` is the site's.

        Of what does not train in this round, what was left out before stays: it is added when that trains again.
        """
        key = derive(secret, "upload", task.run, task.round, task.site) if self.stages else b""
        yield from upload.pack(self.stages, adapter, broadcast, self.schema, key=key, residual=residual)
        for name in sorted(self.stays.keys() - upload.residual_of(self.stages, self.schema).keys()):
            yield Packed({}, {name: residual[name] if name in residual else _zeros(self.stays[name])})


def _zeros(field: Field) -> torch.Tensor:
    return torch.zeros([size or 0 for size in field.shape], dtype=tensors.DTYPES[field.dtype])


def _about(task: TaskSpec) -> dict[str, Any]:
    """Return what an update says of itself."""
    return {
        "format": 1,
        "run": task.run,
        "round": task.round,
        "site": task.site,
        "attempt": task.attempt,
        "broadcast": task.adapter,
        "method_hash": task.method_hash,
    }


def usage() -> dict[str, float]:
    """Return what this process has used of its machine, as `Usage` of fleet.proto has it."""
    gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return {"memory_bytes": peak_memory_bytes(), "cpu_s": time.process_time(), "gpu_bytes": gpu}


def peak_memory_bytes() -> int:
    """Most memory this process has had resident; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
