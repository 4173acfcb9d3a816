"""Plain torch: the whole model in every process, and one sum of the few trained gradients in each step."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import distributed, nn

from offsite.client.site.engines.base import Ranks, Share, check_rows, hold, mean, spare
from offsite.client.site.job import EngineSpec
from offsite.emulator import optimisers
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.modality import Batch
from offsite.emulator.optimisers import Estimator
from offsite.emulator.retention.objective import objective_of
from offsite.emulator.tuning.adapting import optimizer, set_rate, shares, update
from offsite.kernels.schema import TensorMap
from offsite.protos.spec import LocalTraining


class Plain:
    """The reference that every other engine must agree with."""

    @classmethod
    def preload(cls) -> None:
        """Nothing is needed."""

    @classmethod
    def check(cls, training: LocalTraining, spec: EngineSpec) -> None:
        """Take any optimiser; each process needs a row."""
        check_rows(training, spec)
        optimisers.make(training.optimiser.name, training.optimiser.settings)

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
        """Take a model with its adapter attached."""
        self._model = spare(model, spec).to(ranks.device)
        self._parameters = list(trained.values())
        self._training, self._ranks = training, ranks
        pieces = spec.pieces(training.batch_size)
        self._share = partial(Share, ranks=ranks, pieces=pieces, packing=spec.packing)
        self._optimizer = optimizer(self._parameters, training, first_step=first_step)
        self._objective = objective_of(training)
        self._shares, self._steps = shares(training), 0
        self._hold = hold(training, trained, anchor)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    def step(self, batch: Batch) -> float:
        """Take one optimiser step on a batch and return its mean loss before the step.

        A penalty is no part of that, but where an optimiser estimates gradients from what is lessened.
        """
        set_rate(self._optimizer, self._training.learning_rate * self._shares[self._steps])
        if isinstance(self._optimizer, Estimator):
            loss = self._optimizer.estimate(lambda: self._loss(batch))
        else:
            loss = self._differentiate(batch)
        update(self._optimizer, self._parameters, self._training)
        self._hold.pull()
        self._steps += 1
        return loss

    def _loss(self, batch: Batch) -> float:
        return mean(self._hold.added_to(torch.stack(list(self._losses(batch))).sum()), self._ranks)

    def _losses(self, batch: Batch) -> Iterator[torch.Tensor]:
        return self._share(batch).losses(self._model, self._objective)

    def _differentiate(self, batch: Batch) -> float:
        own = list[torch.Tensor]()
        for loss in self._losses(batch):
            held = loss if own else self._hold.added_to(loss)  # a penalty counts once
            held.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            own.append(loss.detach())
        if self._ranks.world > 1:
            self._average_gradients()
        return mean(torch.stack(own).sum(), self._ranks)

    def _average_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:  # here, though maybe not in the other processes
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self._ranks.world
        for gradient, piece in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))

    def gather(self, method: Method, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off the model."""
        return method.state(self._model, places)
