"""Training in little memory: pieces of a batch, few activations, packed rows."""

from typing import Any

import pytest
import torch

from offsite.client.site.job import EngineSpec, TrainerJob

from .ranks import TRAINING, Loaded

Jobs = Any


class Kept:
    """A tensor that is kept for a way back, and the bytes of all that are."""

    now = most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        Kept.now += tensor.nbytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.tensor.nbytes


def steps(job: TrainerJob) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Take a job's steps in this process; return losses, the adapter, and the most bytes that are kept at once."""
    loaded = Loaded(job)
    engine = loaded.engine()
    Kept.now = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        losses = [engine.step(batch) for batch in loaded.batches]
    return losses, engine.gather(loaded.method, loaded.places), Kept.most


@pytest.mark.parametrize(
    ("size", "spare"),
    [(4, {"micro_batch": 1}), (5, {"micro_batch": 2, "packing": True}), (5, {"packing": True})],
)
def test_pieces_of_a_batch_give_its_loss_and_its_step_and_keep_less_and_packed_rows_do_so_too(
    job: Jobs, size: int, spare: dict[str, Any]
) -> None:
    training = TRAINING | {"batch_size": size}
    losses, whole, much = steps(job(training=training))
    told, adapter, little = steps(job(training=training, **spare))
    assert told == pytest.approx(losses, abs=1e-5) and len(set(losses)) == len(losses)
    for key, value in adapter.items():
        torch.testing.assert_close(value, whole[key], atol=1e-5, rtol=0)
    assert little < much or "micro_batch" not in spare


def test_checkpointing_keeps_less_and_changes_no_bit(job: Jobs) -> None:
    losses, whole, much = steps(job(training=TRAINING))
    told, adapter, little = steps(job(training=TRAINING, checkpointing=True))
    assert told == losses and all(torch.equal(value, whole[key]) for key, value in adapter.items())
    assert little < much / 2


@pytest.mark.parametrize(
    ("size", "processes", "rows", "pieces", "fewer"),
    [
        (4, 1, 0, 1, [2, 1]),
        (5, 2, 0, 1, [2]),
        (5, 2, 1, 2, []),
        (8, 1, 3, 3, [2, 1]),
        (1, 1, 0, 1, []),
        (4, 1, 9, 1, [2, 1]),
    ],
)
def test_pieces_get_smaller_until_each_process_has_one_row_at_a_time(
    size: int, processes: int, rows: int, pieces: int, fewer: list[int]
) -> None:
    spec: EngineSpec | None = EngineSpec(processes=processes, micro_batch=rows)
    assert spec and spec.pieces(size) == pieces
    sizes = list[int]()
    while spec := spec.halved(size):
        sizes.append(spec.micro_batch)
    assert sizes == fewer
