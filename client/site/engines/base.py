"""What all engines share, so that a run's arithmetic depends neither on the engine nor on the number of processes.

Every process holds the whole batch and computes the loss of its own rows, all at once or piece by piece, weighted by
their targets, or whatever an objective's loss is the mean over: the mean over the processes is then the mean over the
batch, and so is the gradient.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from offsite.client.site.job import EngineSpec
from offsite.emulator import retention
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.modality import Batch
from offsite.emulator.objectives import Objective
from offsite.emulator.retention.hold import Hold
from offsite.kernels.schema import TensorMap
from offsite.protos.errors import InputError, ResourceError
from offsite.protos.spec import LocalTraining


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them."""

    rank: int
    world: int
    device: torch.device


class Engine(Protocol):
    """Runs training steps; every process enters every call."""

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        training: LocalTraining,
        spec: EngineSpec,
        ranks: Ranks,
        *,
        first_step: int = 0,
        anchor: TensorMap | None = None,
    ) -> None:
        """Take an attached model, its trained parameters by adapter key, and how and by whom they are trained.

        `first_step` is how many steps of the run, and of those that it goes on from, led to this round; `anchor` is
        what the training's retention holds the parameters to.
        """
        ...

    @classmethod
    def preload(cls) -> None:
        """Import what trainers need beside torch, before they are forked: no thread, no tensor, no GPU."""
        ...

    @classmethod
    def check(cls, training: LocalTraining, spec: EngineSpec) -> None:
        """Raise InputError for what it cannot train, and ValueError for an optimiser that is not known.

        Asked before anything is read: what is made of it afterwards asks for nothing else.
        """
        ...

    @property
    def model(self) -> nn.Module:
        """The model as it stands, for forward passes; every process makes the same ones."""
        ...

    def step(self, batch: Batch) -> float:
        """Take one optimiser step on a batch and return its mean loss before the step."""
        ...

    def gather(self, method: Method, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off the model, whole."""
        ...


def join(spec: EngineSpec, rendezvous: Path) -> Ranks:
    """Meet the other processes of this job; raises ResourceError, InputError.

    Through a file that is not there yet, or where the launcher that started them says (MASTER_ADDR, MASTER_PORT).
    """
    rank = int(os.environ.get("RANK", "0"))
    if spec.launcher and (world := os.environ.get("WORLD_SIZE", "none")) != str(spec.processes):
        what = f"the launcher started {world} processes, and the site joined with --processes {spec.processes}"
        raise InputError(f"{what}; both must be the same")
    device = _device(spec, int(os.environ.get("LOCAL_RANK", str(rank))))
    if spec.processes > 1 or spec.name == "deepspeed":
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method="env://" if spec.launcher else rendezvous.absolute().as_uri(),
            rank=rank,
            world_size=spec.processes,
        )
    return Ranks(rank, spec.processes, device)


def _device(spec: EngineSpec, index: int) -> torch.device:
    count = torch.cuda.device_count() if spec.device != "cpu" else 0
    if spec.device == "cpu" or (spec.device == "auto" and not count):
        return torch.device("cpu")
    here = index + 1 if spec.launcher else spec.processes  # at least; others may be on other machines
    if here > count:
        raise ResourceError(
            f"the engine asks for {here} processes on one GPU each, but torch sees {count} GPUs here; "
            "ask for fewer processes or for device 'cpu'"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_rows(training: LocalTraining, spec: EngineSpec) -> None:
    """Raise InputError if some process would have no row of a batch."""
    if training.batch_size < spec.processes:
        raise InputError(
            f"a batch of {training.batch_size} sequences cannot be split over {spec.processes} processes; "
            "the site should use fewer processes or the run a larger batch_size"
        )


class Share:
    """A process's part of a batch: its rows, cut into as many pieces as the site's memory asks for."""

    def __init__(self, batch: Batch, ranks: Ranks, pieces: int, *, packing: bool) -> None:
        rows = batch.share(ranks.rank, ranks.world)
        rows = rows.packed() if packing else rows
        self._ranks = ranks
        self._pieces = [rows.share(at, pieces) for at in range(pieces)] if pieces > 1 else [rows]
        self._weights = [piece.terms * ranks.world / batch.terms for piece in self._pieces]

    def losses(self, model: nn.Module, objective: Objective) -> Iterator[Tensor]:
        """Yield the loss of each piece, whose graph is the caller's to use up before the next.

        Their sum is the loss of this process's rows, and its mean over the processes the objective's mean over the
        batch.
        """
        common = self._common(model, objective)
        for piece, weight in zip(self._pieces, self._weights, strict=True):
            yield objective.loss(model, piece.to(self._ranks.device), common) * weight

    def _common(self, model: nn.Module, objective: Objective) -> float:
        """Return what the loss of each row takes from the whole batch."""
        total: Tensor | None = None
        for piece, weight in zip(self._pieces, self._weights, strict=True):
            one = objective.common(model, piece.to(self._ranks.device))
            if one is None:
                return 0.0
            total = one * weight if total is None else total + one * weight
        return 0.0 if total is None else mean(total, self._ranks)


def spare(model: nn.Module, spec: EngineSpec) -> nn.Module:
    """Have a model keep few activations, where the site says so; raises InputError where it cannot."""
    if spec.checkpointing:
        name = "activation_checkpointing_enable"  # as newer versions of transformers call it
        enable: Any = getattr(model, name, None) or getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise InputError("checkpointing: this model has none; train without --checkpointing")
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(f"checkpointing: this model cannot ({error}); train without --checkpointing") from None
    return model


def hold(training: LocalTraining, trained: Mapping[str, nn.Parameter], anchor: TensorMap | None) -> Hold:
    """Return what holds the parameters of a training to what they were; raises ValueError on an unknown retention."""
    return Hold(retention.make(training.retention.name, training.retention.settings), trained, anchor or {})


def mean(loss: Tensor, ranks: Ranks) -> float:
    """Mean of a number over the processes."""
    total = loss.detach().clone()
    if ranks.world > 1:
        distributed.all_reduce(total)
    return float(total) / ranks.world
