"""Where a kernel runs: its torch reference anywhere, and the Triton kernel of the same name where tensors are on a GPU.

A reference in `offsite.kernels.NAME` has its twin in `offsite.kernels.gpu.NAME`: a function of the same name, which
takes and returns the same. What calls a reference neither knows nor asks where it runs.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)  # of what Triton kernels take; they add up in fp32

P = ParamSpec("P")
T = TypeVar("T")


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def by_device(reference: Callable[P, T]) -> Callable[P, T]:
    """Give the work of a reference to its twin where its first argument, a tensor, is on a GPU and Triton is there.

    Autograd sees through neither, so that an autograd function calls them. Under autocast, which casts what a reference
    is made of, and in double precision the reference runs.
    """

    @wraps(reference)
    def run(*arguments: P.args, **settings: P.kwargs) -> T:
        first = arguments[0]
        assert isinstance(first, Tensor), "a kernel's first argument says where it runs"
        suits = first.is_cuda and first.dtype in PRECISIONS and not torch.is_autocast_enabled("cuda")
        if not (suits and has_triton()):
            return reference(*arguments, **settings)
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]  # where Triton starts what it runs
            outcome: T = twin(reference)(*arguments, **settings)
        return outcome

    return run


@cache
def twin(reference: Callable[P, T]) -> Callable[P, T]:
    """Return the Triton kernel for a reference."""
    module: Any = importlib.import_module(reference.__module__.replace("kernels.", "kernels.gpu.", 1))
    return cast(Callable[P, T], getattr(module, reference.__name__))
