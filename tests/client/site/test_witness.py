"""What is said to train does, or is refused by name."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from offsite.emulator.methods.proof import Effects, Witness

from .ranks import Loaded

Jobs = Any


def test_a_fresh_adapter_is_proved_though_half_of_its_gradients_are_zero(job: Jobs) -> None:
    loaded = Loaded(job())
    assert not any(bool(value.any()) for key, value in loaded.broadcast.items() if key.endswith(".B"))
    witness = Witness(loaded.trained)
    loaded.engine().step(loaded.batches[0])
    witness.judge()


def test_effects_are_proved_without_a_gradient_and_leave_no_bit_changed(job: Jobs) -> None:
    loaded = Loaded(job())
    Effects(loaded.model, loaded.trained).judge()
    assert loaded.model.training and all(parameter.grad is None for parameter in loaded.trained.values())
    assert all(torch.equal(value, loaded.broadcast[key]) for key, value in loaded.trained.items())
    mlp = loaded.model.get_submodule("base_model.model.model.layers.3.mlp")
    mlp.up_proj = Deaf(mlp.up_proj, 0.0)
    with pytest.raises(ValueError, match=r"2 trained tensors have no effect on the loss: 5\.mlp\.up_proj\.A, 5\.mlp\."):
        Effects(loaded.model, loaded.trained).judge()


class Deaf(nn.Module):
    """Reads a wrapped map's own weight, as fused kernels do, or lets its adapter through multiplied by a number."""

    def __init__(self, wrapped: Any, through: float | None) -> None:
        super().__init__()
        self.wrapped, self.through = wrapped, through

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bare = functional.linear(x, self.wrapped.weight)
        return bare if self.through is None else bare + self.through * (self.wrapped(x) - bare)


@pytest.mark.parametrize(
    ("through", "fault"),
    [
        (None, r"2 trained tensors get no gradient.*: 5\.mlp\.up_proj\.A, 5\.mlp\.up_proj\.B$"),
        (0.0, r"2 trained tensors have no effect on the loss: 5\.mlp\.up_proj\.A, 5\.mlp\.up_proj\.B$"),
        (
            float("nan"),
            r"28 trained tensors get a gradient that is not finite: 0\.self_attn\.q_proj\.A, .* and 25 more$",
        ),
    ],
)
def test_tensors_that_do_not_train_are_refused_by_name(job: Jobs, through: float | None, fault: str) -> None:
    loaded = Loaded(job())
    witness = Witness(loaded.trained)
    mlp = loaded.model.get_submodule("base_model.model.model.layers.3.mlp")
    mlp.up_proj = Deaf(mlp.up_proj, through)
    loaded.engine().step(loaded.batches[0])
    with pytest.raises(ValueError, match=fault):
        witness.judge()
