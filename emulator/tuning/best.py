"""Ending a training early, at its best moment by text that it is not trained on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Best:
    """The weights of a training's best moment: of its start and every `every` steps, the last ones or their average.

    The average is the mean of the weights after each step so far, as long as there are fewer of them than
    1 / (1 - averaging), and a moving one from then on; the start is not part of it. Training has had enough once it
    went on for `patience` steps without a better moment. What is kept takes twice the parameters' memory.

    What `at` has for a step is called after it, with the best moment's weights in place; at the end, if training did
    not come to it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[], float],
        *,
        every: int,
        patience: int,
        averaging: float = 0.95,
        at: Mapping[int, Callable[[], None]] | None = None,
    ) -> None:
        """Watch these parameters by a loss of the model that they are part of, and begin with them as they are."""
        self._parameters, self._loss = parameters, loss
        self._every, self._patience, self._averaging = every, patience, averaging
        self._at = dict(at or {})
        self._average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._least = torch.tensor(loss(), dtype=torch.float64).nan_to_num(nan=torch.inf)
        self._when, self._step = torch.tensor(0), torch.tensor(0)  # when that was, and how far training has got

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All that it keeps."""
        kept = {"least": self._least, "when": self._when, "step": self._step}
        kept |= {f"average.{name}": tensor for name, tensor in self._average.items()}
        return kept | {f"best.{name}": tensor for name, tensor in self._best.items()}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Take the weights into the average and, if it is time, look whether they or it are the best so far."""
        self._step.fill_(step)
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter, max(1 - self._averaging, 1 / step))
        if step % self._every == 0:
            self._look()
            with self._in_place(self._average):
                self._look()
        if call := self._at.pop(step, None):
            with self._in_place(self._best):
                call()

    def enough(self) -> bool:
        """Tell whether there was no better moment for too long."""
        return int(self._step - self._when) >= self._patience

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters the best moment's values, for good: training is over."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._best[name])
        for _, call in sorted(self._at.items()):
            call()

    def _look(self) -> None:
        loss = self._loss()
        if loss < self._least:  # never where it is no number
            self._least.fill_(loss)
            self._when.copy_(self._step)
            for name, parameter in self._parameters.items():
                self._best[name].copy_(parameter)

    @contextmanager
    def _in_place(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Put other values in the parameters' place for a while."""
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = values[name]
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]
