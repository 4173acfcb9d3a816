"""A mixture of shards on the real model, beside LoRA of as many values and of four times as many.

Losses fall by 0.31, 0.37 and 0.23 nats (seed 0), each at a rate of its own.
"""

from collections.abc import Callable
from math import log
from typing import Any

import pytest

from offsite.emulator import methods

PLACES = {place: place for place in range(24, 30)}
VALUES = 10_176  # d_in + d_out of all linear maps of a layer
METHODS = {"mos": ("mos", {}, 3e-3), "as-many": ("lora", {"rank": 2}, 3e-3), "more": ("lora", {"rank": 8}, 1e-3)}


@pytest.mark.slow
@pytest.mark.long
def test_few_values_do_most_of_what_lora_does_with_as_many_and_with_more(bench: Any, tell: Callable[..., None]) -> None:
    drops, counts = dict[str, float](), dict[str, int]()
    for name, (called, settings, rate) in METHODS.items():
        method = methods.make(called, settings)
        start = method.start(bench.base, PLACES, seed=bench.seed)
        counts[name] = sum(one.numel() for one in start.values() if one.is_floating_point())
        assert bench.plugged(method, start) == bench.zero_shot, "it begins as a change of nothing"
        _, adapter = bench.tuned(bench.base, PLACES, method, rate)
        drops[name] = log(bench.zero_shot) - log(bench.plugged(method, adapter))
    tell(**drops, **{f"{name} values": count for name, count in counts.items()})
    assert counts["mos"] == counts["as-many"] == 2 * len(PLACES) * VALUES == counts["more"] // 4
    assert drops["mos"] >= 0.75 * drops["as-many"] > 0
    assert drops["mos"] >= 0.8 * drops["more"] > 0
