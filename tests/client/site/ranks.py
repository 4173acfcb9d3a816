"""A job's model in this process, and the work of a rank that looks at what DeepSpeed did to the model's tensors.

Ranks are forked from one process, as trainers are (`offsite.protos.processes`): DeepSpeed takes seconds to import.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from offsite.client.site import trainer
from offsite.client.site.engines import ENGINES, Engine, Ranks, join, zero
from offsite.client.site.job import TrainerJob
from offsite.emulator import bundle, methods
from offsite.emulator.batches import training_batches
from offsite.emulator.modality import Batch, encode, read
from offsite.emulator.outline import Outline
from offsite.emulator.precision import DTYPES
from offsite.protos import tensors
from offsite.protos.documents import from_json

SPREAD = "spread"  # a file beside the job: every parameter is to be spread over the ranks
# Steep, clipped and decaying, so that a fault in any of these shows.
TRAINING = {"steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "schedule": "cosine_with_min_lr(floor=0.2)"}
TRAINING |= {"weight_decay": 0.1, "gradient_clipping": 0.05}
preload = trainer.preload


class Loaded:
    """A job's model with its adapter, its batches, and an engine in this process."""

    def __init__(self, job: TrainerJob) -> None:
        torch.set_num_threads(1)
        spec = job.task.training
        self.places = Outline(job.manifest.layers, job.manifest.trainable).places
        dtype = DTYPES[spec.precision]
        model, tokenizer = bundle.load(Path(job.bundle), layout=bundle.described(job.manifest), dtype=dtype)
        self.method = methods.make(job.task.method.name, job.task.method.settings)
        self.broadcast = tensors.load(Path(job.adapter))
        self.model = self.method.attach(model, self.places, self.broadcast).train()
        self.trained = self.method.named_parameters(self.model, self.places)
        encoded = self.encoded = encode(read(Path(job.data)), tokenizer, max_length=spec.max_length)
        self.batches: list[Batch] = list(
            training_batches(encoded, batch_size=spec.batch_size, steps=spec.steps, first_step=0, seed=spec.seed)
        )
        self.job = job

    def engine(self, ranks: Ranks | None = None) -> Engine:
        spec = self.job.engine
        ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        return ENGINES[spec.name](self.model, self.trained, self.job.task.training, spec, ranks)


def main(path: Path) -> int:
    """Train; leave `adapter.safetensors` and `outcome.json`: losses, how many tensors are frozen, which changed."""
    os.dup(1)  # `launch` takes its end for the process's
    os.dup2(2, 1)
    job = from_json(TrainerJob, path.read_bytes(), where="job")
    os.environ["WORLD_SIZE"] = str(job.engine.processes)
    spread = path.with_name(SPREAD).exists()
    if spread:
        _spread_small_ones()
    loaded = Loaded(job)
    frozen = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if not p.requires_grad}
    ranks = join(job.engine, path.with_name("rendezvous"))
    engine = loaded.engine(ranks)
    assert not spread or not any(parameter.numel() for parameter in loaded.model.parameters()), "every one is spread"
    losses = [engine.step(batch) for batch in loaded.batches]
    changed = _changed(loaded.model, frozen, whole=job.engine.zero_stage < 3)
    adapter = engine.gather(loaded.method, loaded.places)
    if ranks.rank == 0:
        tensors.save(path.with_name("adapter.safetensors"), adapter)
        outcome = {"losses": losses, "frozen": len(frozen), "changed": changed}
        path.with_name("outcome.json").write_text(json.dumps(outcome))
    return 0


def _spread_small_ones() -> None:
    """By default DeepSpeed leaves them whole, and a tiny model has no others."""
    usual = zero.configuration

    def configuration(*arguments: Any) -> dict[str, Any]:
        config: dict[str, Any] = usual(*arguments)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    zero.configuration = configuration


def _changed(model: torch.nn.Module, frozen: dict[str, torch.Tensor], *, whole: bool) -> list[str]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=not whole):
        after = dict(model.named_parameters())
        return [n for n, p in frozen.items() if p.dtype != after[n].dtype or not torch.equal(p, after[n])]
