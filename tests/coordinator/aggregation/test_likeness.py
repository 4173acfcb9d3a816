"""How alike updates are, beside the matrices multiplied out."""

import pytest
import torch

from offsite.coordinator.aggregation.likeness import Change, gram, with_mean
from offsite.kernels.schema import Field, Rule, Schema, Tensors, groups

SCHEMA: Schema = {
    "q.A": Field("F32", (None, 5), Rule.PRODUCT, group="q"),
    "q.B": Field("F32", (6, None), Rule.PRODUCT, group="q"),
    "norm": Field("F32", (4,), Rule.MEAN),
    "index": Field("I32", (3,), Rule.FIXED, below=9),
}
WEIGHTS = [0.5, 0.3, 0.2]


def adapter(seed: int, rank: int = 2) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"q.A": (rank, 5), "q.B": (6, rank), "norm": (4,)}
    made = {key: torch.randn(size, generator=draw) for key, size in sizes.items()}
    return made | {"index": torch.arange(3, dtype=torch.int32)}


def flat(tensors: Tensors) -> torch.Tensor:
    """The weights that an adapter stands for, in a row."""
    return torch.cat([(tensors["q.B"].double() @ tensors["q.A"].double()).flatten(), tensors["norm"].double()])


def changes() -> list[Change]:
    """Three sites of two ranks."""
    every = frozenset(groups(SCHEMA))
    return [Change(adapter(seed, rank), adapter(9, rank), every) for seed, rank in ((1, 2), (2, 2), (3, 3))]


def test_inner_products_are_those_of_the_matrices() -> None:
    rows = torch.stack([flat(dict(one.update)) - flat(dict(one.broadcast)) for one in changes()])
    inner = gram(changes(), SCHEMA)
    assert inner is not None
    torch.testing.assert_close(inner, rows @ rows.T)
    mean = torch.tensor(WEIGHTS, dtype=torch.float64) @ rows
    expected = torch.nn.functional.cosine_similarity(rows, mean[None])
    assert with_mean(inner, WEIGHTS) == pytest.approx(expected.tolist(), abs=1e-9)


def test_a_group_that_a_site_lacks_it_has_not_changed() -> None:
    first, *others = changes()
    whole = gram([first._replace(update=first.update | {"norm": first.broadcast["norm"]}), *others], SCHEMA)
    lacking = {key: one for key, one in first.update.items() if key != "norm"}
    part = gram([first._replace(update=lacking, groups=frozenset({"q"})), *others], SCHEMA)
    assert whole is not None and part is not None and torch.equal(whole, part)


def test_a_site_against_all_others_is_seen_and_one_that_changed_nothing_is_like_none() -> None:
    def change(factor: float) -> Change:
        start = adapter(9)
        step = torch.ones(4) * factor
        return Change(start | {"norm": start["norm"] + step}, start, frozenset(groups(SCHEMA)))

    inner = gram([change(1.0), change(2.0), change(-1.0), change(0.0)], SCHEMA)
    assert inner is not None
    assert with_mean(inner, [0.25] * 4) == pytest.approx([1.0, 1.0, -1.0, 0.0], abs=1e-5)


def test_bits_that_are_voted_on_are_not_compared() -> None:
    assert gram([], {"mask": Field("U8", (1,), Rule.VOTE, bits=8)}) is None
