"""Linear maps whose matrix is stored in a format of few bits, and unpacked only while it is used."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import is_transposed, layers, linears, shape
from offsite.emulator.formats.base import Format, Parts


class PackedLinear(nn.Linear):
    """y = W x + b with W in a format; a kind of `nn.Linear`, so that adapters attach to it as to any other."""

    def __init__(self, format: Format, parts: Mapping[str, Tensor], bias: Tensor | None, *, d_out: int, d_in: int):
        """Take the parts of a matrix (d_out, d_in); tensors that may train become parameters, frozen at first."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense matrix
        self.format, self.out_features, self.in_features = format, d_out, d_in
        for name, (expected, dtype) in format.shapes(d_out, d_in).items():
            part = parts[name]
            if tuple(part.shape) != expected or part.dtype != dtype:
                raise ValueError(
                    f"part {name!r} of a {format.name} matrix ({d_out}, {d_in}): expected {dtype} {expected}, "
                    f"got {part.dtype} {tuple(part.shape)}"
                )
            if name in format.trained:
                self.register_parameter(name, _parameter(part))
            else:
                self.register_buffer(name, part)
        self.register_parameter("bias", None if bias is None else _parameter(bias))

    @property
    def parts(self) -> Parts:
        """The tensors that W is stored as."""
        return {name: getattr(self, name) for name in self.format.shapes(self.out_features, self.in_features)}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in nn.Linear
        """W (d_out, d_in) fp32, unpacked anew at each call."""
        return self.format.decode(self.parts, self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the map in the dtype of its input."""
        trained = [self.get_parameter(name) for name in self.format.trained]
        output: Tensor = _Unpacked.apply(self, input, self.bias, *trained)  # type: ignore[no-untyped-call]
        return output

    def reset_parameters(self) -> None:
        """Do nothing: there is no dense matrix to draw."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move what W is stored as, as torch asks a module to, but leave its dtypes, which are the format's."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class _Unpacked(torch.autograd.Function):
    """x -> x W' + b. Autograd keeps what W is stored as and no dense copy: that is read again on the way back."""

    @staticmethod
    def forward(ctx: Any, linear: PackedLinear, input: Tensor, bias: Tensor | None, *trained: Tensor) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(input if any(ctx.needs_input_grad[3:]) else None, *trained)
        return linear.format.multiply(linear.parts, input, bias, linear.out_features, linear.in_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        linear, (input, *trained) = ctx.linear, ctx.saved_tensors
        rows, size = gradient.reshape(-1, linear.out_features), (linear.out_features, linear.in_features)
        of_bias = rows.sum(dim=0) if ctx.needs_input_grad[2] else None
        if input is None:  # no part trains
            parts = linear.parts | dict(zip(linear.format.trained, trained, strict=True))
            multiply = linear.format.multiply
            inward = multiply(parts, gradient, None, *size, transposed=True) if ctx.needs_input_grad[1] else None
            return None, inward, of_bias, *(None for _ in trained)
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in trained]
            weight = linear.format.decode(linear.parts | dict(zip(linear.format.trained, leaves, strict=True)), *size)
        inward = gradient @ weight.detach().to(gradient.dtype) if ctx.needs_input_grad[1] else None
        of_weight = rows.T @ input.reshape(-1, linear.in_features).to(rows.dtype)
        of_parts = torch.autograd.grad(weight, leaves, of_weight.float())
        return None, inward, of_bias, *of_parts


def _parameter(tensor: Tensor) -> nn.Parameter:
    """Return a parameter as it is, so that what shares it keeps sharing it, and of a tensor a frozen one."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def dense(linear: nn.Module) -> Tensor:
    """Return W (d_out, d_in) fp32 of any linear map y = W x."""
    weight = linear.weight.detach().float()  # type: ignore[operator]
    return weight.T.contiguous() if is_transposed(linear) else weight


def packed(linear: nn.Module, format: Format, parts: Mapping[str, Tensor]) -> PackedLinear:
    """Return a linear map's stand-in with the matrix that `parts` stand for, and the same bias."""
    d_out, d_in = shape(linear)
    return PackedLinear(format, parts, linear.bias, d_out=d_out, d_in=d_in)  # type: ignore[arg-type]


def pack(model: nn.Module, parts: Mapping[tuple[int, str], Parts], format: Format) -> nn.Module:
    """Return a model whose maps (place, path inside the layer) have these parts; it shares all other tensors.

    Maps elsewhere that have the same matrix, as those of shared places do, have the same parts.
    """
    twin = restack(model, range(len(layers(model))))
    stack = layers(twin)
    linear_of = {(place, path): stack[place].get_submodule(path) for place, path in parts}
    stored = {id(linear.get_parameter("weight")): packed(linear, format, parts[at]) for at, linear in linear_of.items()}
    for layer in stack:
        for path in linears(layer):
            linear = layer.get_submodule(path)
            source = None if isinstance(linear, PackedLinear) else stored.get(id(linear.get_parameter("weight")))
            if source is not None:
                layer.set_submodule(path, packed(linear, format, source.parts))
    return twin
