"""Ways to choose layers: the paper's own first, and beside it those that rounding cannot tell from it."""

import math
import random

import pytest
import torch

from offsite.emulator.builders.crash import judged
from offsite.emulator.builders.reductions import BEAM, MARGIN, SIDE, Ways, cluster, drop, weakest
from offsite.kernels.cka import linear_cka


def merged(links: list[float], count: int) -> list[range]:
    """The paper's procedure: join the two neighbours that are most alike at their border, again and again."""
    clusters = [range(at, at + 1) for at in range(len(links) + 1)]
    while len(clusters) > count:
        best = max(range(len(clusters) - 1), key=lambda at: links[clusters[at].stop - 1])
        clusters[best : best + 2] = [range(clusters[best].start, clusters[best + 1].stop)]
    return clusters


def links_of(*unlike: float) -> list[float]:
    return [1 - one for one in unlike]


def test_merging_the_most_similar_neighbours_is_cutting_the_smallest_links() -> None:
    draw = random.Random(0)
    for _ in range(200):
        depth = draw.randint(1, 30)
        links = [draw.random() for _ in range(depth - 1)]
        count = draw.randint(1, depth)
        gap, margin, ways = weakest(links, count - 1)
        assert next(iter(ways)) == tuple(segment.start - 1 for segment in merged(links, count)[1:])
        assert all(0 <= strain < margin <= MARGIN for strain in ways.values()) and gap >= 0
        assert len(ways) <= math.comb(2 * SIDE, SIDE)


def test_a_segment_keeps_its_upper_median() -> None:
    jumps = torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(1))
    found = torch.cat([jump.expand(size, -1, -1) for jump, size in zip(jumps, (1, 2, 3, 4, 1), strict=True)])
    assert next(iter(cluster(found, 5).strains)) == (0, 2, 4, 8, 10)


def test_links_that_rounding_may_swap_are_both_looked_at_and_clear_ones_are_not() -> None:
    _, margin, ways = weakest(links_of(0.5, 0.0080, 0.0082, 0.001), 2)
    assert margin == MARGIN and ways == {(0, 2): 0.0, (0, 1): pytest.approx(math.log(82 / 80))}
    _, _, clear = weakest(links_of(0.5, 0.0070, 0.0082, 0.001), 2)
    assert clear == {(0, 2): 0.0}
    equal = weakest(links_of(*[1e-9] * 40), 9)[2]
    assert equal == {tuple(range(9)): 0.0}, "of very many that are equal the first are taken"


def test_the_likelier_way_is_taken_whichever_of_two_near_links_is_weaker_today() -> None:
    worth = {(0, 2): 3.0, (0, 1): 2.8}
    for one in (0.0081, 0.0083):
        gap, margin, ways = weakest(links_of(0.5, one, 0.0082, 0.001), 2)
        way, lead = judged(Ways((), gap, margin, ways), worth.__getitem__)
        assert way == (0, 1) and lead == pytest.approx(0.2, abs=0.01)
    # However much likelier, it counts less and less as it comes to the margin, and does not jump where it leaves it.
    _, margin, ways = weakest(links_of(0.5, 0.0082 * math.exp(-0.0999), 0.0082, 0.001), 2)
    assert judged(Ways((), 0.0, margin, ways), worth.__getitem__)[0] == (0, 2)


def test_of_equally_likely_ways_the_first_is_taken() -> None:
    ways = Ways((), 0.0, MARGIN, {(0, 2): 0.0, (0, 1): 1e-6})
    for worth in ({(0, 2): 3.0, (0, 1): 3.00001}, {(0, 2): 3.00001, (0, 1): 3.0}):
        assert judged(ways, worth.__getitem__)[0] == (0, 1)


def test_the_layer_drop_variant_drops_the_right_one_of_the_most_similar_neighbours() -> None:
    found = torch.randn(7, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found[3] = found[2] + 0.01 * found[3]
    kept = list(range(7))
    for keep in range(6, 1, -1):
        links = [float(linear_cka(found[a], found[b])) for a, b in zip(kept, kept[1:], strict=False)]
        del kept[links.index(max(links)) + 1]
        assert next(iter(drop(found, keep).strains)) == tuple(kept)
    assert next(iter(drop(found, 6).strains)) == (0, 1, 2, 4, 5, 6)


def test_layers_that_are_nearly_as_alike_may_be_dropped_instead_but_not_very_many_ways_are_followed() -> None:
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(4, 60, 6, generator=draw, dtype=torch.float64)
    found = torch.stack([base[0], base[0] + 0.1 * base[3], base[1], base[1] + 0.1 * base[3], base[2]])
    ways = drop(found, 4)
    assert {(0, 2, 3, 4), (0, 1, 2, 4)} >= ways.strains.keys() and ways.gap < 1.0
    many = drop(torch.randn(16, 40, 4, generator=draw) * 1e-3 + torch.randn(40, 4, generator=draw), 8)
    assert 1 <= len(many.strains) <= BEAM and all(strain < many.margin for strain in [*many.strains.values()][1:])
