"""What a trainer leaves for the agent to send: the adapter after training, packed by the stages, and its metrics."""

import resource
import sys
from pathlib import Path

import torch

from offsite.client.site.handout import Handout
from offsite.client.site.job import TrainerJob
from offsite.emulator.methods import Adapter
from offsite.kernels.schema import Tensors, settle
from offsite.protos import tensors, upload
from offsite.protos.documents import canonical, to_json
from offsite.protos.errors import MismatchError
from offsite.protos.security.draws import derive
from offsite.protos.spec import TaskSpec, UpdateMetrics


def check(adapter: Adapter, broadcast: Adapter) -> None:
    """Raise MismatchError unless an adapter has the broadcast's tensors, all finite."""
    for key, start in broadcast.items():
        found = tuple(adapter[key].shape) if key in adapter else None
        if found != tuple(start.shape):
            raise MismatchError(f"after training, tensor {key} has shape {found}, expected {tuple(start.shape)}")
        if not bool(torch.isfinite(adapter[key]).all()):
            what = f"after training, tensor {key} holds values that are not finite"
            raise MismatchError(what, reason="FAULT_DIVERGED")


def pack(adapter: Adapter, handed: Handout, job: TrainerJob) -> Tensors:
    """Return what leaves the site of an adapter; raises InputError, ValueError where a stage cannot pack it."""
    task = job.task
    schema = settle(handed.method.schema(adapter), {key: tensor.shape for key, tensor in adapter.items()})
    key = derive(Path(job.secret).read_bytes(), "upload", task.run, task.round, task.site)
    return upload.pack(upload.make(task.upload), adapter, handed.broadcast, schema, key=key)


def write(update: Tensors, metrics: UpdateMetrics, task: TaskSpec, out: Path) -> None:
    """Write an update beside its metrics, each whole or not at all."""
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
    tensors.save(out / "update.safetensors", update, metadata={"offsite": canonical(about).decode()})


def peak_memory_bytes() -> int:
    """Most memory this process has had resident; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
