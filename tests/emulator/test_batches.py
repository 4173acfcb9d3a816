from itertools import chain

import pytest
import torch

from offsite.emulator.batches import evaluation_batches, schedule, training_batches
from offsite.emulator.modality.causal_text.encoding import Tokens


@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (2, 5), (8, 4)])
def test_rounds_continue_one_endless_sequence_of_permutations(count: int, batch_size: int) -> None:
    def steps(first: int, number: int) -> list[list[int]]:
        return schedule(count, batch_size=batch_size, steps=number, first_step=first, seed=3)

    whole = steps(0, 12)
    assert steps(0, 4) + steps(4, 4) + steps(8, 4) == whole
    flat = list(chain(*whole))
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))
    assert flat[:count] != flat[count : 2 * count] or count == 2
    assert schedule(count, batch_size=batch_size, steps=12, first_step=0, seed=4) != whole


def test_training_batches_follow_the_schedule() -> None:
    encoded = [Tokens((token, token), (token, token)) for token in range(10, 17)]
    batches = training_batches(encoded, batch_size=3, steps=2, first_step=5, seed=1)
    rows = schedule(7, batch_size=3, steps=2, first_step=5, seed=1)
    assert [batch.input_ids[:, 0].tolist() for batch in batches] == [[10 + row for row in step] for step in rows]


def test_evaluation_batches_hold_everything_in_order_of_length() -> None:
    encoded = [Tokens((length,) * length, (length,) * length) for length in (5, 2, 4, 2, 3)]
    batches = evaluation_batches(encoded, batch_size=2)
    assert [batch.input_ids.shape for batch in batches] == [(2, 2), (2, 4), (1, 5)]
    assert sum(batch.targets for batch in batches) == sum(length - 1 for length in (5, 2, 4, 2, 3))
    assert batches[0].input_ids.dtype == torch.int64
