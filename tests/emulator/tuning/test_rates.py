from types import SimpleNamespace
from typing import Any

import pytest

from offsite.emulator.methods import METHODS
from offsite.emulator.tuning.rates import suited


@pytest.mark.parametrize(("width", "rate"), [(64, 3e-3), (576, 3e-3), (960, 1.8e-3), (4096, 4.2e-4), (8192, 2.1e-4)])
def test_a_rate_shrinks_with_the_width_and_is_never_above_what_was_tried(width: int, rate: float) -> None:
    config = SimpleNamespace(hidden_size=width)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: config))
    assert suited(METHODS["lora"].rate, model) == rate


def test_every_family_says_its_width(family: str, tiny: Any) -> None:
    model = tiny(family)
    width = model.get_input_embeddings().weight.shape[1]
    assert model.config.get_text_config(decoder=True).hidden_size == width
