"""Every format of fixed levels, alone and inside the linear map that unpacks it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from offsite.emulator.formats import FORMATS, Format, make
from offsite.emulator.formats.int4 import Int4
from offsite.emulator.formats.nf4 import NF4
from offsite.emulator.formats.packed import PackedLinear, dense, packed
from offsite.kernels.quantise import product


@dataclass(frozen=True)
class Scaled:
    """A format with a part that trains: whole numbers times one step per row."""

    name: ClassVar[str] = "scaled"
    trained: ClassVar[tuple[str, ...]] = ("steps",)

    def shapes(self, d_out: int, d_in: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"numbers": ((d_out, d_in), torch.int8), "steps": ((d_out, 1), torch.float32)}

    def decode(self, parts: Mapping[str, Tensor], d_out: int, d_in: int) -> Tensor:
        return parts["numbers"].float() * parts["steps"]

    def multiply(self, parts: Any, x: Tensor, bias: Any, d_out: int, d_in: int, *, transposed: bool = False) -> Tensor:
        return product(x, bias, self.decode(parts, d_out, d_in), transposed=transposed)


@pytest.fixture(params=["nf4", "int4"])
def format(request: pytest.FixtureRequest) -> Any:
    return make(request.param, {"block": 8})


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(21, 6)


def scaled() -> PackedLinear:
    torch.manual_seed(0)
    parts = {"numbers": torch.randint(-9, 10, (6, 21)).to(torch.int8), "steps": torch.rand(6, 1)}
    return PackedLinear(Scaled(), parts, torch.randn(6), d_out=6, d_in=21)


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 21), (1, 1), (5, 8), (3, 33)])
def test_the_settings_and_the_matrix_determine_what_is_stored(format: Any, d_out: int, d_in: int) -> None:
    parts = format.encode(torch.randn(d_out, d_in))
    found = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    assert found == format.shapes(d_out, d_in)
    weight = format.decode(parts, d_out, d_in)
    assert weight.shape == (d_out, d_in) and weight.dtype == torch.float32 and weight.is_contiguous()
    again = format.encode(weight)
    assert all(torch.equal(again[name], part) for name, part in parts.items())


def test_a_block_of_64_costs_four_and_a_quarter_bits_an_entry() -> None:
    parts = NF4().encode(torch.randn(16, 576))
    assert 8 * sum(part.nbytes for part in parts.values()) / (16 * 576) == 4.25


def test_a_block_that_is_longer_than_a_row_is_the_row() -> None:
    weight = torch.randn(4, 21)
    whole, long = Int4(block=21), Int4(block=1000)
    assert torch.equal(whole.decode(whole.encode(weight), 4, 21), long.decode(long.encode(weight), 4, 21))
    assert long.shapes(4, 21) == whole.shapes(4, 21)


@pytest.mark.parametrize("name", ["nf4", "int4"])
def test_a_block_without_entries_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        make(name, {"block": 0})


def test_parts_that_do_not_fit_are_named(format: Any, linear: nn.Linear) -> None:
    parts = format.encode(dense(linear))
    with pytest.raises(ValueError, match="part 'codes'.*expected torch.uint8 \\(6, 11\\), got torch.uint8 \\(5, 11\\)"):
        packed(linear, format, parts | {"codes": parts["codes"][:5]})
    with pytest.raises(ValueError, match="part 'scales'.*expected torch.float16.*got torch.float32"):
        packed(linear, format, parts | {"scales": parts["scales"].float()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(21,), (4, 21), (2, 3, 21)])
def test_a_packed_map_computes_what_the_dense_one_does(
    format: Any, linear: nn.Linear, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    small = packed(linear, format, format.encode(dense(linear)))
    inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    output = small(inputs[0])
    assert linear.bias is not None
    expected = functional.linear(inputs[1], small.weight.to(dtype), linear.bias.to(dtype))
    assert output.dtype == dtype and torch.equal(output, expected)
    direction = torch.randn_like(output)
    output.backward(direction)
    bias_gradient, linear.bias.grad = linear.bias.grad, None
    expected.backward(direction)
    assert inputs[0].grad is not None and inputs[1].grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=0)
    assert bias_gradient is not None and linear.bias.grad is not None
    torch.testing.assert_close(bias_gradient, linear.bias.grad)


def kept_for_backward(small: nn.Module, input: Tensor) -> list[Tensor]:
    kept = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        small(input)
    return kept


@pytest.mark.parametrize("cast", [False, True])
def test_nothing_of_the_matrix_is_kept_for_the_way_back(format: Any, linear: nn.Linear, cast: bool) -> None:
    small, input = packed(linear, format, format.encode(dense(linear))), torch.randn(4, 21, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        assert all(tensor.numel() < 6 * 21 for tensor in kept_for_backward(small, input))
        assert any(tensor.numel() == 6 * 21 for tensor in kept_for_backward(linear, input))  # or it could not fail


def test_gradients_are_of_the_dtype_of_what_they_are_of_also_where_autograd_casts() -> None:
    small, input = scaled(), torch.randn(4, 21, requires_grad=True)
    steps = small.get_parameter("steps").requires_grad_()
    direction = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = small(input)
    assert output.dtype == torch.bfloat16
    output.backward(direction.bfloat16())
    assert input.grad is not None and steps.grad is not None
    assert input.grad.dtype == steps.grad.dtype == torch.float32
    torch.testing.assert_close(input.grad, direction @ small.weight.detach(), rtol=0.05, atol=0.3)


def test_of_a_map_with_parts_that_train_only_they_and_the_input_are_kept() -> None:
    small = scaled()
    small.get_parameter("steps").requires_grad_()
    kept = kept_for_backward(small, torch.randn(4, 21))
    assert sorted(tensor.numel() for tensor in kept) == [6, 4 * 21]


def test_parts_that_train_get_the_gradient_that_decoding_gives_them() -> None:
    small, input, direction = scaled(), torch.randn(2, 4, 21, requires_grad=True), torch.randn(2, 4, 6)
    steps = small.get_parameter("steps").requires_grad_()
    small(input).backward(direction)
    found, of_input = steps.grad, input.grad
    steps.grad = input.grad = None
    functional.linear(input, small.weight, small.bias).backward(direction)
    assert found is not None and of_input is not None and steps.grad is not None and input.grad is not None
    torch.testing.assert_close(found, steps.grad)
    torch.testing.assert_close(of_input, input.grad)


def test_a_part_that_trains_stays_the_same_parameter_where_it_is_shared() -> None:
    small = scaled()
    twin = PackedLinear(small.format, small.parts, small.bias, d_out=6, d_in=21)
    assert twin.get_parameter("steps") is small.get_parameter("steps")
    assert twin.bias is small.bias


def test_changing_a_models_dtype_leaves_what_is_stored(format: Any, linear: nn.Linear) -> None:
    small = packed(linear, format, format.encode(dense(linear)))
    before = copy.deepcopy(small.parts)
    nn.Sequential(small).to(torch.bfloat16)
    assert all(
        torch.equal(part, before[name]) and part.dtype == before[name].dtype for name, part in small.parts.items()
    )
    assert small(torch.randn(3, 21).bfloat16()).dtype == torch.bfloat16


def test_every_format_has_a_name_of_its_own() -> None:
    kinds: dict[str, type[Format]] = FORMATS
    assert all(kind.name == name for name, kind in kinds.items())
    assert list(kinds) == sorted(kinds)
