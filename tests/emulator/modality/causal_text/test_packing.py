"""Packed sequences are to a model what each is alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator import modality
from offsite.emulator.modality import Batch, collate
from offsite.emulator.modality.causal_text.encoding import IGNORED, Tokens
from offsite.emulator.modality.causal_text.packing import first_fit

MIXED = ("opt", "bloom")  # their positions come from a mask that packed rows have not
LENGTHS = (5, 14, 3, 9, 2, 7)


def batch() -> Batch:
    """Sequences of which the first tokens, and some within, are not learned."""
    draw = torch.Generator().manual_seed(3)
    rows = [tuple(torch.randint(3, 90, (n,), generator=draw).tolist()) for n in LENGTHS]
    return collate([Tokens(one, tuple(IGNORED if at in (0, 3) else id for at, id in enumerate(one))) for one in rows])


def test_the_longest_go_first_each_where_there_is_room() -> None:
    assert first_fit([5, 14, 3, 9, 2, 7], 14) == [[1], [3, 0], [5, 2, 4]]
    assert first_fit([4, 4, 4], 4) == [[0], [1], [2]]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


def test_a_family_that_takes_packed_rows_learns_from_them_what_it_does_from_padded_ones(tiny: Any, family: str) -> None:
    model, text = tiny(family, layers=2), batch()
    assert modality.packs(model) == (family not in MIXED)
    if family in MIXED:
        return
    one, other = modality.loss(model, text), modality.loss(model, text.packed())
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    for mine, yours in zip(gradients(model, one), gradients(model, other), strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for what in (modality.likelihoods, modality.predictions):
            torch.testing.assert_close(what(model, text), what(model, text.packed()), atol=1e-4, rtol=1e-5)
        score = modality.score(model, [text])
        assert modality.score(model, [text.packed()]).total == pytest.approx(score.total, rel=1e-6)


def test_fewer_positions_are_run_and_a_part_of_a_packed_batch_is_packed(tiny: Any) -> None:
    model, text, positions = tiny(layers=1), batch(), list[int]()
    model.register_forward_pre_hook(lambda _, __, named: positions.append(named["input_ids"].numel()), with_kwargs=True)
    modality.loss(model, text)
    modality.loss(model, text.packed())
    assert positions == [6 * 14, 3 * 14]
    part: Any = text.packed().share(0, 2).to(torch.device("cpu"))
    assert part.packing and not replace(part, packing=False).packing and len(part.labels) == 3


def test_a_model_that_mixes_them_is_known(tiny: Any) -> None:
    model = tiny("llama", layers=2)

    class Deaf(nn.Module):
        """Takes no notice of where sequences begin."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, *, position_ids: Tensor | None = None, **named: Any) -> Any:
            return model(**named)

    assert modality.packs(model) and not modality.packs(Deaf())
