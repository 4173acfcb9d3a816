"""Proof that what is said to train does: some maps are never called, and their adapters would stay as they were."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from offsite.protos.errors import MismatchError


class Witness:
    """Sees the gradient of every trained tensor in the first backward pass, before an engine may spread it."""

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Watch parameters, by adapter key."""
        self._keys = list(trained)
        self._finite: dict[str, bool] = {}
        self._moves: dict[str, bool] = {}
        self._hooks = [self._watch(key, parameter) for key, parameter in trained.items()]

    def _watch(self, key: str, parameter: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
        def see(gradient: torch.Tensor) -> None:
            self._finite[key] = bool(torch.isfinite(gradient).all())
            self._moves[key] = bool(gradient.any())

        handle: torch.utils.hooks.RemovableHandle = parameter.register_hook(see)  # type: ignore[no-untyped-call]
        return handle

    def judge(self) -> None:
        """Stop watching; raises MismatchError that names the tensors without a gradient, or without an effect.

        One factor of a map may have a gradient of zero, as A has while B is zero, but not both.
        """
        for hook in self._hooks:
            hook.remove()
        effective = {_map(key) for key, moves in self._moves.items() if moves}
        _refuse((key for key in self._keys if key not in self._finite), "get no gradient: the model does not use them")
        _refuse((key for key in self._keys if not self._finite[key]), "get a gradient that is not finite")
        _refuse((key for key in self._keys if _map(key) not in effective), "have no effect on the loss")


def _map(key: str) -> str:
    return key.rpartition(".")[0]


def _refuse(keys: Iterable[str], fault: str) -> None:
    if found := list(keys):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise MismatchError(f"{len(found)} trained tensors {fault}: {', '.join(found[:3])}{more}")
