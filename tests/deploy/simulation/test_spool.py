"""Updates that lie together in a spool are those that were put there."""

import os
from pathlib import Path

import pytest
import torch

from offsite.deploy.simulation.spool import Block, Layout, Stretch
from offsite.kernels.schema import Field, Rule, Schema, Tensors

SCHEMA: Schema = {  # of three sizes of values, in an order that is not that of their places
    "a.index": Field("U8", (3,), Rule.FIXED, below=9),
    "b.half": Field("BF16", (2, 3), Rule.MEAN),
    "c.float": Field("F32", (5,), Rule.MEAN),
    "d.none": Field("F32", (0, 4), Rule.MEAN),
}


def update(seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    floats = {"b.half": torch.randn(2, 3, generator=draw).bfloat16(), "c.float": torch.randn(5, generator=draw)}
    return floats | {"a.index": torch.tensor([seed, 1, 2], dtype=torch.uint8), "d.none": torch.empty(0, 4)}


def test_what_is_let_in_is_read_back_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, path = Layout(SCHEMA), tmp_path / "spool"
    block, end = Block(layout, 4), 0
    path.touch()
    file = os.open(path, os.O_RDWR)
    for begun, seeds, kept in ((0, (1, 2, 3, 4), (0, 1, 2, 3)), (4, (5, 6, 7), (0, 2)), (6, (8,), ())):
        block.count = 0
        for seed in seeds:
            block.add(update(seed))
        block.keep(kept)
        assert block.count == len(kept) and {len(column) for column in block.columns.values()} == {len(kept)}
        size = block.write(file, end)
        assert size == len(kept) * layout.size and end == begun * layout.size, "no room is left between"
        stretch = Stretch(file, end, layout, len(kept))
        for row, number in enumerate(kept):
            expected, read = update(seeds[number]), stretch.row(row)
            assert read.keys() == expected.keys()
            assert all(torch.equal(read[name], expected[name]) for name in expected)
        end += size
    sizes = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *how: sizes.append(preadv(*how)) or sizes[-1])
    stretch = Stretch(file, 0, layout, 4)
    assert torch.equal(stretch.row(3)["c.float"], update(4)["c.float"]) and sizes == [4 * 5 * 4]
    os.truncate(path, 7)
    with pytest.raises(OSError, match="shorter"):
        _ = Stretch(file, 0, layout, 4).row(0)["a.index"]
    os.close(file)
