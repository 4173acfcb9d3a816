"""Sequences one behind the other in few rows, so that nothing is computed of padding; each attends to itself alone.

Position ids that begin anew tell transformers where a sequence begins, from which its masks follow, windows included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import text_config
from offsite.emulator.modality.causal_text.batch import TokenBatch, collate
from offsite.emulator.modality.causal_text.encoding import IGNORED, Tokens

LENGTHS = (24, 13, 7, 4)  # of what is tried: the last three go in one row
NEAR = 1e-4  # of the deviation of the logits: how far they may be apart in fp32
COARSE = 5e-2  # and where weights have 16 bits


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return which sequences go in each row of a width: the longest first, each in the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for one in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        row = next((at for at, left in enumerate(room) if left >= lengths[one]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(one)
        room[row] -= lengths[one]
    return rows


def logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return (n, v) logits of a batch's targets, sequence by sequence; the rows are as long as its longest sequence."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    width = max(lengths)
    rows = first_fit(lengths, width)
    positions = torch.arange(width).repeat(len(rows), 1)
    places = torch.zeros(batch.input_ids.shape, dtype=torch.int64)  # of each token among those of the rows
    for row, members in enumerate(rows):
        start = 0
        for one in members:
            end = start + lengths[one]
            places[one, : lengths[one]] = row * width + torch.arange(start, end)
            positions[row, start:end] = torch.arange(lengths[one])
            start = end
        positions[row, start:] = torch.arange(width - start)  # padding is a sequence of its own
    device, real = batch.input_ids.device, batch.attention_mask.bool()
    positions, places = positions.to(device), places.to(device)
    ids = torch.zeros_like(positions).view(-1).index_copy(0, places[real], batch.input_ids[real]).view_as(positions)
    wanted = places[:, :-1][batch.labels[:, 1:] != IGNORED]
    columns, at = (wanted % width).unique(return_inverse=True)
    out: Tensor = model(input_ids=ids, position_ids=positions, logits_to_keep=columns, use_cache=False).logits
    return out[wanted // width, at]


@torch.no_grad()
def holds(model: nn.Module) -> bool:
    """Tell whether a model predicts of packed sequences what it does of each in a row of its own, without dropout."""
    parameter = next(model.parameters())
    draw = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(text_config(model).vocab_size, (n,), generator=draw).tolist()) for n in LENGTHS]
    batch = collate([Tokens(one, one) for one in ids]).to(parameter.device)
    targets = batch.labels[:, 1:] != IGNORED
    training = model.training
    model.eval()
    try:
        alone = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        alone, packed = alone[:, :-1][targets].float(), logits(model, batch).float()
    except (TypeError, ValueError, RuntimeError):  # it takes no position ids, or no rows without a mask
        return False
    finally:
        model.train(training)
    exact = all(one.dtype == torch.float32 for one in model.parameters() if one.is_floating_point())
    return float((alone - packed).abs().max()) <= (NEAR if exact else COARSE) * float(alone.std())
