"""Sums of published adapters: the same bytes in any order, what was added comes off, and what is no sum is refused."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.emulator.composition import compose
from offsite.emulator.methods import Adapter, make, own_format
from offsite.emulator.methods.entries import sparse
from offsite.emulator.plug import load

PLACES = {0: 0, 4: 4}


def published(folder: Path, tiny: Any, name: str, *, seed: int, base: str = "tiny", **settings: Any) -> Path:
    """The folder of an adapter of a method that has learned something."""
    method, draw = make(name, {"share": 0.02, **settings}), torch.Generator().manual_seed(seed)
    start = method.start(tiny(), PLACES, seed=seed)
    moved = {
        key: torch.randn(tensor.shape, generator=draw) if key.endswith(".change") else tensor
        for key, tensor in start.items()
    }
    own_format.write(folder, method, moved, base_name=base)
    return folder


def weights(tiny: Any, *adapters: Adapter) -> torch.Tensor:
    """The base's weights with each adapter merged in."""
    model = tiny()
    for adapter in adapters:
        make("lt-sft", {}).merge(model, adapter)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def read(folder: Path) -> Adapter:
    return own_format.read(folder)[1]


@pytest.fixture
def three(tmp_path: Path, tiny: Any) -> list[Path]:
    """A language's, a task's on some maps alone, and one of a method that all sites agree on."""
    return [
        published(tmp_path / "language", tiny, "lt-sft", seed=1),
        published(tmp_path / "task", tiny, "spiel", seed=2, modules=["q_proj", "up_proj"]),
        published(tmp_path / "smallest", tiny, "sara", seed=3),
    ]


def test_a_sum_changes_the_base_as_all_of_them_do(
    three: list[Path], tiny: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    compose(tmp_path / "sum", three)
    torch.testing.assert_close(weights(tiny, read(tmp_path / "sum")), weights(tiny, *map(read, three)))
    counts = [sum(len(part.at) for part in sparse(read(folder)).values()) for folder in (tmp_path / "sum", *three)]
    assert max(counts[1:]) < counts[0] <= sum(counts[1:])
    merged = tiny()
    own_format.read(tmp_path / "sum")[0].merge(merged, read(tmp_path / "sum"))
    with torch.no_grad():
        torch.testing.assert_close(load(tiny(), tmp_path / "sum")(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_order_changes_no_bit(three: list[Path], tmp_path: Path) -> None:
    sums = []
    for number, order in enumerate(permutations(three)):
        compose(tmp_path / f"sum {number}", order)
        sums.append((tmp_path / f"sum {number}" / own_format.TENSORS).read_bytes())
    assert len({*sums}) == 1


def test_what_was_added_is_taken_off_bit_for_bit(three: list[Path], tmp_path: Path) -> None:
    language, task, _ = three
    compose(tmp_path / "sum", [language, task])
    compose(tmp_path / "left", [language, task], without=[task])
    assert (tmp_path / "left" / own_format.TENSORS).read_bytes() == (language / own_format.TENSORS).read_bytes()
    compose(tmp_path / "back", [tmp_path / "sum"], without=[task])  # the sum was rounded when it was written
    back, own = read(tmp_path / "back"), sparse(read(language))
    for place, part in own.items():
        there = sparse(back)[place]
        known = torch.isin(there.at, part.at)
        torch.testing.assert_close(there.change[known], part.change, rtol=1e-5, atol=1e-6)
        assert float(there.change[~known].abs().sum()) == 0


def test_what_is_no_sum_is_refused(three: list[Path], tiny: Any, tmp_path: Path) -> None:
    language = three[0]
    with pytest.raises(ValueError, match="the adapters take each other off, and no change is left"):
        compose(tmp_path / "sum", [language], without=[language])
    with pytest.raises(ValueError, match="there is no adapter to compose"):
        compose(tmp_path / "sum", [])
    other = published(tmp_path / "other", tiny, "lt-sft", seed=1, base="another")
    with pytest.raises(ValueError, match="is of the base tiny, .*other of another; only changes of one base add up"):
        compose(tmp_path / "sum", [language, other])
    method = make("paca", {"rank": 3})
    own_format.write(tmp_path / "paca", method, method.start(tiny(), PLACES, seed=0), base_name="tiny")
    with pytest.raises(ValueError, match="paca: paca trains no single entries of maps"):
        compose(tmp_path / "sum", [language, tmp_path / "paca"])
    assert not (tmp_path / "sum").exists()


def test_maps_of_other_sizes_are_refused(three: list[Path], tmp_path: Path) -> None:
    method, adapter = own_format.read(three[0])
    key = "0.mlp.up_proj.size"
    own_format.write(tmp_path / "turned", method, adapter | {key: adapter[key].flip(0)}, base_name="tiny")
    with pytest.raises(ValueError, match=rf"'{key}': \(d_out, d_in\) = \(32, 48\) in one adapter and \(48, 32\)"):
        compose(tmp_path / "sum", [three[0], tmp_path / "turned"])
