"""A retention at work: on the live parameters of a training, with its anchor beside them."""

from collections.abc import Mapping

from torch import Tensor, nn

from offsite.emulator.retention.base import Penalising, Pulling, Retention
from offsite.kernels.schema import TensorMap


class Hold:
    """What holds parameters, by the adapter's keys, to what they were; an inactive retention does nothing at all."""

    def __init__(self, retention: Retention, parameters: Mapping[str, nn.Parameter], anchor: TensorMap) -> None:
        device = next(iter(parameters.values())).device
        self._retention, self._parameters = retention, parameters
        self._anchor = {name: tensor.to(device) for name, tensor in anchor.items()}

    def added_to(self, loss: Tensor) -> Tensor:
        """Return a loss with the penalty, where there is one."""
        if not isinstance(self._retention, Penalising):
            return loss
        return loss + self._retention.penalty(self._parameters, self._anchor)

    def pull(self) -> None:
        """Move the parameters after a step, where the retention does so."""
        if isinstance(self._retention, Pulling):
            self._retention.pull(self._parameters, self._anchor)
