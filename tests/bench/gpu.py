"""How fast each kernel is beside its torch reference, torch.compile and a library, and engines beside stock peft.

    python tests/bench/gpu.py [--short] [--turns 20] [--only kernels|engines] [--out FILE.md]

Each kernel does a forward and a backward pass. All ways of a line take turns in one process; a line has the median of
the reference's milliseconds, and for the others the median of the ratios to the reference in the same turn, above 1
where they are faster. Without a GPU, or without Triton, the product runs the reference: the columns `triton` and
`peak` are then "needs a GPU". `--short` has small sizes, few turns and no torch.compile, to see that all runs.

Then SmolLM2-135M trains with each engine, each in a process of its own (see `engines.py`).
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import engines
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from offsite.kernels import codebook, device, mixed, quantise, sketch, sparse
from offsite.kernels import partial as partly

Step = Callable[[], object]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
COLUMNS = ("kernel", "reference ms", "triton", "torch.compile", "library", "peak MiB", "reference's peak")


class Size(NamedTuple):
    """What a map multiplies."""

    rows: int
    d_in: int
    d_out: int
    rank: int


class Case(NamedTuple):
    """The ways to do what a kernel does: the product's, plain torch's and a library's, if there is one."""

    ours: Step
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    library: Step | None


def drawn(*shape: int, dtype: torch.dtype = DTYPE, trains: bool = False) -> Tensor:
    """Return small random numbers."""
    return (0.1 * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_(trains)


def both(run: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Go forward and back."""
    output = run(*inputs)
    output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]


def peft_linear(size: Size) -> Any:
    """Return stock peft's LoRA of one map."""
    model = nn.Sequential(nn.Linear(size.d_in, size.d_out, bias=False, device=DEVICE, dtype=DTYPE))
    return get_peft_model(model, LoraConfig(r=size.rank, target_modules=["0"], init_lora_weights=False)).to(DEVICE)


def columns(size: Size) -> Case:
    """Some columns of a map train; the library is LoRA of as high a rank."""
    x, weight = drawn(size.rows, size.d_in, trains=True), drawn(size.d_out, size.d_in)
    at, change = torch.randperm(size.d_in)[: size.rank].to(DEVICE), drawn(size.d_out, size.rank, dtype=torch.float32)

    def plain(x: Tensor, change: Tensor) -> Tensor:
        y = functional.linear(x, weight)
        return y + functional.linear(x[..., at].float(), change).to(y.dtype)

    def ours(x: Tensor, change: Tensor) -> Tensor:
        return partly.add_columns(functional.linear(x, weight), x, at, change)

    inputs = x, change.requires_grad_()
    return Case(partial(both, ours, *inputs), plain, inputs, partial(both, peft_linear(size), x))


def rows(size: Size) -> Case:
    """Some rows of a map train."""
    x, weight = drawn(size.rows, size.d_in, trains=True), drawn(size.d_out, size.d_in)
    at, change = torch.randperm(size.d_out)[: size.rank].to(DEVICE), drawn(size.rank, size.d_in, dtype=torch.float32)

    def plain(x: Tensor, change: Tensor) -> Tensor:
        y = functional.linear(x, weight)
        return y.index_add(-1, at, functional.linear(x.float(), change).to(y.dtype))

    def ours(x: Tensor, change: Tensor) -> Tensor:
        return partly.add_rows(functional.linear(x, weight), x, at, change)

    inputs = x, change.requires_grad_()
    return Case(partial(both, ours, *inputs), plain, inputs, partial(both, peft_linear(size), x))


def entries(size: Size) -> Case:
    """One entry of a hundred of a map trains; the library is torch's own sparse matrix."""
    x, shape = drawn(size.rows, size.d_in, trains=True), (size.d_out, size.d_in)
    count = size.d_out * size.d_in // 100
    at = torch.randperm(size.d_out * size.d_in)[:count].sort().values.int().to(DEVICE)
    values = drawn(count, dtype=torch.float32, trains=True)
    where = torch.stack([at // size.d_in, at % size.d_in]).long()

    def plain(x: Tensor, values: Tensor) -> Tensor:
        return functional.linear(x.float(), sparse.dense(at, values, shape))

    def library(x: Tensor, values: Tensor) -> Tensor:
        return torch.sparse.mm(torch.sparse_coo_tensor(where, values, shape, check_invariants=False), x.float().T).T

    def ours(x: Tensor, values: Tensor) -> Tensor:
        return sparse.product(x, at, values, shape)

    inputs = x, values
    return Case(partial(both, ours, *inputs), plain, inputs, partial(both, library, *inputs))


def adapters(size: Size) -> Case:
    """Four adapters of unequal ranks in one batch; the library is peft, each adapter with its rows by itself."""
    x, weight = drawn(size.rows, size.d_in, trains=True), drawn(size.d_out, size.d_in)
    sizes = [size._replace(rank=max(1, size.rank >> number)) for number in range(4)]
    pairs = [
        (drawn(one.rank, size.d_in, dtype=torch.float32), drawn(size.d_out, one.rank, dtype=torch.float32))
        for one in sizes
    ]
    down, up, starts = mixed.stack(pairs, [1.0] * 4)
    which = torch.arange(size.rows, device=DEVICE) % 4

    def plain(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        parts = [x[number::4].float() @ down[a:b].T @ up[a:b] for number, (a, b) in enumerate(pairwise(starts))]
        y = functional.linear(x, weight)
        return y + torch.stack(parts, dim=1).flatten(0, 1).to(y.dtype)

    def ours(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return mixed.add(functional.linear(x, weight), x, which, mixed.Adapters(down, up, starts))

    models = [peft_linear(one) for one in sizes]

    def library() -> None:
        for number, model in enumerate(models):
            both(model, x[number::4])

    inputs = x, down.requires_grad_(), up.requires_grad_()
    return Case(partial(both, ours, *inputs), plain, inputs, library)


def few_bits(size: Size, multiply: Any, parts: tuple[Any, ...], matrix: Callable[[], Tensor], library: Any) -> Case:
    """Go both ways through a map in few bits: W x, and W' of that."""
    x = drawn(size.rows, size.d_in)

    def ours() -> Tensor:
        return multiply(multiply(x, None, *parts, transposed=False), None, *parts, transposed=True)  # type: ignore[no-any-return]

    def plain(x: Tensor) -> Tensor:
        weight = matrix().to(x.dtype)
        return functional.linear(x, weight) @ weight

    return Case(ours, plain, (x,), library)


def nf4(size: Size) -> Case:
    """NF4; the library is bitsandbytes, if it is installed."""
    packed, scales = quantise.quantise(drawn(size.d_out, size.d_in), quantise.NF4_LEVELS, block=64)
    settings = {"d_in": size.d_in, "block": 64}
    multiply = partial(quantise.multiply, **settings)
    matrix = partial(quantise.dequantise, packed, scales, quantise.NF4_LEVELS, **settings)
    try:
        import bitsandbytes as bnb
    except ImportError:
        library = None
    else:
        linear = bnb.nn.Linear4bit(size.d_in, size.d_out, bias=False, compute_dtype=DTYPE, quant_type="nf4").to(DEVICE)
        library = partial(both, linear, drawn(size.rows, size.d_in, trains=True))
    return few_bits(size, multiply, (packed, scales, quantise.NF4_LEVELS), matrix, library)


def sketched(size: Size) -> Case:
    """A grid of 16 centroids a row."""
    codes = torch.randint(256, (size.d_out, size.d_in // 2), dtype=torch.uint8, device=DEVICE)
    parts = drawn(size.d_out, 1, 16, dtype=torch.float32), codes
    return few_bits(size, sketch.multiply, parts, partial(sketch.decode, *parts), None)


def additive(size: Size) -> Case:
    """Two codebooks of 256 vectors of 8."""
    codes = torch.randint(256, (size.d_out * size.d_in // 4,), dtype=torch.uint8, device=DEVICE)
    parts = codes, drawn(2, 256, 8, dtype=torch.float16), drawn(size.d_out, dtype=torch.float16)
    settings = {"d_in": size.d_in, "bits": 8}
    matrix = partial(codebook.matrix, *parts, **settings)
    return few_bits(size, partial(codebook.multiply, **settings), parts, matrix, None)


CASES = {
    "columns": columns,
    "rows": rows,
    "entries": entries,
    "several adapters": adapters,
    "nf4": nf4,
    "sketch": sketched,
    "additive": additive,
}


@contextmanager
def references() -> Iterator[None]:
    """Have the product run its references inside, on a GPU too."""
    before, device.has_triton = device.has_triton, lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        device.has_triton = before


def seconds(step: Step) -> float:
    """Return how long a step takes, to the end of what it started on the GPU."""
    if GPU:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak(step: Step) -> str:
    """Return the most memory of the GPU that a step takes beside what is there before, in MiB."""
    if not GPU:
        return "needs a GPU"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def line(name: str, size: Size, *, turns: int, compiles: bool) -> tuple[str, ...]:
    """Measure one kernel."""
    case = CASES[name](size)

    def reference() -> None:
        with references():
            case.ours()

    ways: dict[str, Step] = {"reference": reference}
    if GPU and device.has_triton():
        ways["triton"] = case.ours
    if compiles:
        compiled = torch.compile(case.plain)
        trains = any(tensor.requires_grad for tensor in case.inputs)
        ways["torch.compile"] = partial(both, compiled, *case.inputs) if trains else partial(compiled, *case.inputs)
    if case.library:
        ways["library"] = case.library
    for step in ways.values():
        step()
        step()  # what is compiled or chosen at the first is there
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, step in ways.items():
            times[way].append(seconds(step))
    ratios = {
        way: f"{median(first / own for first, own in zip(times['reference'], times[way], strict=True)):.2f}x"
        for way in ways
    }
    missing = {"triton": "needs a GPU", "torch.compile": "left out", "library": "none installed"}
    others = [ratios.get(way, reason) for way, reason in missing.items()]
    title = f"{name} {tuple(size)}"
    return title, f"{1000 * median(times['reference']):.3f}", *others, peak(case.ours), peak(reference)


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Return a markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines))


def main() -> None:
    """Measure, print the tables, and write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--only", choices=["kernels", "engines"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    where = torch.cuda.get_device_name() if GPU else f"the CPU, {torch.get_num_threads()} threads"
    parts = [f"torch {torch.__version__}, {str(DTYPE).removeprefix('torch.')}, on {where}"]
    if asked.only != "engines":
        short, full = Size(64, 128, 128, 8), Size(4096, 4096, 4096, 16) if GPU else Size(512, 576, 1536, 8)
        turns, size = (3, short) if asked.short else (asked.turns, full)
        torch.manual_seed(0)
        lines = [line(name, size, turns=turns, compiles=not asked.short) for name in CASES]
        parts.append("Sizes are (rows, d_in, d_out, rank).\n\n" + table(COLUMNS, lines))
    if asked.only != "kernels":
        parts.append(table(engines.COLUMNS, engines.lines(short=asked.short)))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
