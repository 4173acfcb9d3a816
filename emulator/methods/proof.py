"""Proof that what is said to train does: some maps are never called, and their adapters would stay as they were."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from offsite.emulator import modality
from offsite.emulator.methods.base import Adapter, Measuring, Method
from offsite.emulator.modality import Batch
from offsite.emulator.seeds import generator

ROWS, TOKENS = 2, 16  # of a step that only proves that training works


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
        """Stop watching; raises ValueError that names the tensors without a gradient, or without an effect.

        One factor of a map may have a gradient of zero, as A has while B is zero, but not both.
        """
        for hook in self._hooks:
            hook.remove()
        effective = {_map(key) for key, moves in self._moves.items() if moves}
        _refuse((key for key in self._keys if key not in self._finite), "get no gradient: the model does not use them")
        _refuse((key for key in self._keys if not self._finite[key]), "get a gradient that is not finite")
        _refuse((key for key in self._keys if _map(key) not in effective), "have no effect on the loss")


class Effects:
    """Sees whether what trains has an effect on the loss where no gradient is ever taken, by moving one map at a time.

    It takes a forward pass of a few random tokens for each map that trains.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        """Take an attached model, and what trains in it by adapter key."""
        self._model = model
        self._maps: dict[str, dict[str, nn.Parameter]] = {}
        for key, parameter in trained.items():
            self._maps.setdefault(_map(key), {})[key] = parameter

    @torch.no_grad()
    def judge(self) -> None:
        """Raise ValueError that names the tensors of which no change changes the loss; all have their bits again."""
        batch = modality.default().probe(self._model, rows=ROWS, length=TOKENS)
        training = self._model.training
        self._model.eval()  # dropout would change it, too
        try:
            loss = modality.loss(self._model, batch)
            idle = [key for of_map in self._maps.values() if self._is_idle(of_map, batch, loss) for key in of_map]
        finally:
            self._model.train(training)
        _refuse(idle, "have no effect on the loss")

    def _is_idle(self, of_map: Mapping[str, nn.Parameter], batch: Batch, loss: torch.Tensor) -> bool:
        places = {key: parameter.detach().clone() for key, parameter in of_map.items()}
        for key, parameter in of_map.items():
            parameter.add_(torch.randn(parameter.shape, generator=generator(0, key)).to(parameter.device))
        try:
            return torch.equal(modality.loss(self._model, batch), loss)
        finally:
            for key, parameter in of_map.items():
                parameter.copy_(places[key])


def step(model: nn.Module, method: Method, places: Mapping[int, int], adapter: Adapter) -> None:
    """Attach an adapter, in place, and take one training step on random tokens; raises ValueError unless all trains.

    What a site would find out after it has downloaded the emulator is found out here. Where nothing trains, the tokens
    are measured.
    """
    attached = method.attach(model, places, adapter).train()
    if isinstance(method, Measuring):
        method.measure(attached, places, modality.default().probe(model, rows=ROWS, length=TOKENS))
        sums = method.state(attached, places)
        _refuse((key for key, total in sums.items() if not bool(total.isfinite().all())), "are not finite", what="sums")
        _refuse((key for key, total in sums.items() if not bool(total.any())), "stay zero on random text", what="sums")
        return
    trained = method.named_parameters(attached, places)
    witness = Witness(trained)
    value = modality.loss(attached, modality.default().probe(model, rows=ROWS, length=TOKENS))
    value.backward()  # type: ignore[no-untyped-call]
    if not bool(value.isfinite()):
        raise ValueError(f"the loss of the emulator on random tokens is {float(value)}, so it cannot be trained")
    witness.judge()
    torch.optim.AdamW(list(trained.values()), lr=method.rate).step()
    if strange := [key for key, parameter in trained.items() if not bool(parameter.isfinite().all())]:
        raise ValueError(f"one training step leaves values in {strange[0]} that are not finite")


def _map(key: str) -> str:
    return key.rpartition(".")[0]


def _refuse(keys: Iterable[str], fault: str, *, what: str = "trained tensors") -> None:
    if names := list(keys):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{len(names)} {what} {fault}: {', '.join(names[:3])}{more}")
