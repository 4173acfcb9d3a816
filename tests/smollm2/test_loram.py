"""LoRAM's order on the real model, in inequalities that hold over three seeds: docs/emulators.md has the figures."""

from collections.abc import Callable
from typing import Any

import pytest

from offsite.emulator.methods.lora import Lora
from offsite.emulator.placements import Kept

pytestmark = pytest.mark.slow
Tell = Callable[..., None]


def test_lora_of_a_pruned_model_is_worth_more_in_the_full_one(bench: Any, tell: Tell) -> None:
    """Half of the MLP's channels gone in 26 layers."""
    lora, rate = Lora(rank=8, alpha=16.0), 1e-3
    draft = bench.draft([("loram", {"mlp": 0.5})], Kept())
    small, adapter = bench.tuned(draft.model, draft.outline.places, lora, rate, batch_size=2)
    recovered = bench.plugged(lora, lora.recover(adapter, draft.recovery))
    full, _ = bench.tuned(bench.base, {at: at for at in range(30)}, lora, rate, batch_size=2)
    bound, pruned = bench.perplexity(full), bench.perplexity(small)
    tell(
        zero_shot=bench.zero_shot,
        pruned_zero_shot=bench.perplexity(draft.model),
        pruned_tuned=pruned,
        recovered=recovered,
        bound=bound,
    )
    assert bound <= recovered < bench.zero_shot and recovered < pruned
