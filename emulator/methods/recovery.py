"""LoRA of a narrowed map brought back to the full one (LoRAM, arXiv 2502.13533): zeros where something was pruned.

What methods train that cannot come back so is refused.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from offsite.emulator.methods.base import Adapter, Place, factors


def widen(adapter: Adapter, recovery: Mapping[str, Tensor]) -> Adapter:
    """Scatter the rows of B and the columns of A to where they came from; raises ValueError if they do not fit.

    `recovery` has "<layer>.<path>.rows", the kept rows of a map's W and "<layer>.<path>.columns", its kept columns,
    both int64, and "<layer>.<path>.shape", (d_out, d_in) of the full map. Maps that it does not name stay as they are.
    """
    wide = dict(adapter)
    for place, (A, B) in factors(adapter).items():
        name = f"{place.layer}.{place.path}"
        if f"{name}.shape" not in recovery:
            continue
        d_out, d_in = recovery[f"{name}.shape"].tolist()
        rows = recovery.get(f"{name}.rows", torch.arange(d_out))
        columns = recovery.get(f"{name}.columns", torch.arange(d_in))
        if (len(rows), len(columns)) != (B.shape[0], A.shape[1]):
            raise ValueError(
                f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a map that was narrowed to "
                f"(d_out, d_in) = {(len(rows), len(columns))}"
            )
        wide[place.key("A")] = A.new_zeros(A.shape[0], d_in).index_copy(1, columns, A)
        wide[place.key("B")] = B.new_zeros(d_out, B.shape[1]).index_copy(0, rows, B)
    return wide


def refuse(places: Iterable[Place], recovery: Mapping[str, Tensor], reason: str) -> None:
    """Raise ValueError if one of the maps was narrowed, which are here "the base's, REASON"."""
    for place in places:
        if f"{place.layer}.{place.path}.shape" in recovery:
            raise ValueError(
                f"{place.layer}.{place.path}: the emulator's map is narrower than the base's, {reason}; leave the "
                "layers that train as they are, or train them with another method"
            )
