"""How fast and in how much memory a round's updates become the next version, beside a plain mean in memory.

    python tests/bench/fold.py [--updates 64] [--size-mb 100] [--strategy mean] [--turns 3] [--folder FOLDER]

The product's own step reads each update from its blob, folds it and stores the outcome. How far each went is known, as
it is of all that were accepted, and each was stamped when its digest was checked, as the supervisor does when a round
is over: the step finds that its file is as it was. The yardstick is the weighted sum of the same tensors, all of them
in memory before it begins. Each is done in a process of its own, in turns; a JSON line has the medians of the seconds
of both and of the check, the speed of the step beside the yardstick, that of check and step together, and the most
memory that a step had resident beyond what it had before it began, in updates. Updates of `low-rank` are factors of
rank 64.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from wire import forget_peak, resident

from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.rounds import checks
from offsite.coordinator.runs.steps.orders import Aggregate, Update
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.kernels.schema import Field, Rule, Schema
from offsite.protos import tensors
from offsite.protos.documents import to_json
from offsite.protos.spec import Choice

WIDTH, RANK = 1024, 64
T = TypeVar("T")


def schema(strategy: str, size: int) -> Schema:
    """Return what updates of so many bytes are made of: square matrices, or pairs of factors."""
    if strategy == "mean":
        return {f"0.{at}": Field("F32", (WIDTH, WIDTH), Rule.MEAN) for at in range(size // (4 * WIDTH**2))}
    return {
        f"0.{at}.{part}": Field("F32", (WIDTH, None) if part == "B" else (None, WIDTH), Rule.PRODUCT, f"0.{at}")
        for at in range(size // (8 * WIDTH * RANK))
        for part in "AB"
    }


def adapter(made_of: Schema, seed: int) -> dict[str, torch.Tensor]:
    """Return an adapter of small random values."""
    draw = torch.Generator().manual_seed(seed)
    return {
        key: 1e-2 * torch.randn([RANK if size is None else size for size in field.shape], generator=draw)
        for key, field in made_of.items()
    }


def prepare(folder: Path, made_of: Schema, count: int) -> Aggregate:
    """Store a start and updates; return the order to fold these."""
    blobs = Home(folder / "home", folder).prepare().blobs()

    def store(seed: int) -> Stored:
        tensors.save(folder / "file", adapter(made_of, seed))
        digest, size = blobs.take(folder / "file")
        return Stored(digest=digest, size=size)

    (folder / "schema").write_bytes(to_json(made_of))
    start, digest = store(0), blobs.take(folder / "schema")[0]
    names = [f"site-{number:03}" for number in range(count)]
    updates = tuple(
        Update(site=name, digest=store(seed).digest, examples=8, norm=1.0) for seed, name in enumerate(names, 1)
    )
    last = Version(adapter=start.digest, broadcast={"": start})
    return Aggregate(last=last, schema=digest, tiers=dict.fromkeys(names, ""), updates=updates)


def check(folder: Path, order: Aggregate) -> tuple[float, Aggregate]:
    """Check the updates as a supervisor does; return the seconds, and the order with the stamps."""
    begin, blobs = time.perf_counter(), Home(folder / "home", folder).blobs()
    stamps = [one.result() for one in checks(blobs, [update.digest for update in order.updates])]
    updates = tuple(replace(update, stamp=stamp) for update, stamp in zip(order.updates, stamps, strict=True))
    return time.perf_counter() - begin, replace(order, updates=updates)


def ours(folder: Path, order: Aggregate, strategy: str) -> dict[str, float]:
    """Do the product's step."""
    from offsite.coordinator.runs.steps.folding import aggregate

    spec = Grant(model="none", strategy=Choice(name=strategy), max_update_norm=1e9)
    idle, begin = forget_peak(), time.perf_counter()
    aggregate(Home(folder / "home", folder).node, spec, order)
    return {"seconds": time.perf_counter() - begin, "bytes": resident("VmHWM") - idle}


def plain(made_of: Schema, count: int) -> float:
    """Sum up the same tensors, which are in memory; return the seconds."""
    updates = [adapter(made_of, seed) for seed in range(1, count + 1)]
    begin = time.perf_counter()
    total = {key: torch.zeros_like(tensor) for key, tensor in updates[0].items()}
    for update in updates:
        for key, tensor in update.items():
            total[key] += tensor / count
    return time.perf_counter() - begin


def apart(work: Callable[[], T]) -> T:
    """Do something in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work)


def turn(folder: Path, order: Aggregate, made_of: Schema, strategy: str) -> dict[str, float]:
    """Measure each once."""
    its = apart(partial(plain, made_of, len(order.updates)))
    check_s, stamped = apart(partial(check, folder, order))
    step = apart(partial(ours, folder, stamped, strategy))
    return {"plain_s": its, "check_s": check_s, "step_s": step["seconds"], "bytes": step["bytes"]}


def main() -> None:
    """Measure, and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=64)
    parser.add_argument("--size-mb", type=int, default=100)
    parser.add_argument("--strategy", choices=["mean", "low-rank"], default="mean")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's folder for temporary files")
    asked = parser.parse_args()
    made_of = schema(asked.strategy, asked.size_mb * 10**6)
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        order = prepare(Path(scratch), made_of, asked.updates)
        turns = [turn(Path(scratch), order, made_of, asked.strategy) for _ in range(asked.turns)]
    figures = {name: median(one[name] for one in turns) for name in ("plain_s", "check_s", "step_s")}
    figures["speed"] = figures["plain_s"] / figures["step_s"]
    figures["speed_checked"] = figures["plain_s"] / (figures["check_s"] + figures["step_s"])
    figures["updates_in_memory"] = max(one["bytes"] for one in turns) / (asked.size_mb * 1e6)
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
