"""The precisions of frozen weights by name, and which of them a machine computes in fastest."""

import hashlib
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import Tensor, nn

from offsite.emulator.zoo import cache_folder

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLEARLY = 0.8  # of fp32's time: what is hardly faster is not worth the digits, and a busy machine is noisy
ROUNDS = 4
ROWS, NARROW, WIDE = 64, 576, 1536  # tokens of a batch, and the sizes of a small model's maps


@dataclass(frozen=True)
class Race:
    """How long a processor takes, at best, to train through two frozen maps, in milliseconds."""

    fp32: float
    bf16: float

    @property
    def fastest(self) -> Precision:
        """bf16 only where it is clearly faster: some processors that name its instructions are slower with them."""
        return "bf16" if self.bf16 < CLEARLY * self.fp32 else "fp32"

    def __str__(self) -> str:
        """Say how it went."""
        return f"in a race of matrices fp32 took {self.fp32:.1f} ms, bf16 {self.bf16:.1f} ms"


def fastest(device: torch.device) -> Precision:
    """Return bf16 where the device computes in it clearly faster than in fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return race().fastest


def race() -> Race:
    """Return the result of the race on this processor, run once and kept, so that no two processes differ.

    Where it cannot be kept, nobody races and fp32, which all can, has won.
    """
    runner = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = cache_folder() / "races" / f"{hashlib.sha256(runner.encode()).hexdigest()[:16]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
                kept = json.loads(path.read_text())
                return Race(float(kept["fp32"]), float(kept["bf16"]))
            result = Race(**_times())
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"runner": runner} | asdict(result)))
            partial.replace(path)
            return result
    except OSError:
        return Race(0.0, 0.0)


def explained(model: nn.Module) -> str:
    """Say what a model computes in, and why."""
    first = next(model.parameters())
    name = next((name for name, dtype in DTYPES.items() if dtype == first.dtype), str(first.dtype))
    return f"{name} ({race()})" if first.device.type == "cpu" else name


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _times() -> dict[Precision, float]:
    """Milliseconds of the best of a few runs of each, which take turns, so that a busy machine is as unkind to both."""
    best: dict[Precision, float] = dict.fromkeys(DTYPES, float("inf"))
    for number in range(ROUNDS):  # the first warms up
        for name, dtype in DTYPES.items():
            wide, narrow = torch.ones(WIDE, NARROW, dtype=dtype), torch.ones(NARROW, WIDE, dtype=dtype)
            rows = torch.ones(ROWS, NARROW, dtype=dtype, requires_grad=True)
            start = time.perf_counter()
            out = nn.functional.silu(rows @ wide.T) @ narrow.T
            out.backward(out.detach())  # type: ignore[no-untyped-call]
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
        if number and best["bf16"] > 2 * best["fp32"]:  # emulated, it can take thirty times as long
            break
    return best


def quicken(model: nn.Module) -> torch.dtype:
    """Turn a model to fp32, in place, if its processor is slower in the dtype it has; return that dtype.

    fp32 holds 16-bit values exactly: cast back, what was not trained has the same bytes.
    """
    first = next(model.parameters())
    stored = first.dtype
    if first.device.type == "cpu" and stored != DTYPES[fastest(first.device)]:
        model.float()
    return stored


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Have a model compute in fp32 inside, in place, and give each tensor its dtype, and its bytes, back.

    What is chosen there, such as layers, is the same whatever the model else computes in.
    """
    stored: list[tuple[Tensor, torch.dtype]] = [
        (tensor, tensor.dtype)
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and not tensor.is_meta
    ]
    for tensor, _ in stored:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in stored:
            tensor.data = tensor.data.to(dtype)
