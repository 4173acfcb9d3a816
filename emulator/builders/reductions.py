"""Which layers go: all the ways to choose them that are as good as the best one, as far as rounding can tell.

How unlike two layers are is 1 - CKA, and two links are told apart by the ratio of theirs. Rounding the output of every
linear map to bf16 moves it by up to 1.4 % in SmolLM2-135M, fp32 by less than 0.01 %. So what lies within MARGIN of the
choice is not decided by the links alone: each way has a strain, how much more alike (as the log of the ratio) the
layers are that it holds apart than those the links would have held apart, and all ways of a strain below the margin are
returned. Where there are too many of them, the margin is that of the first that is left out.
"""

import math
from dataclasses import dataclass
from itertools import combinations, pairwise

from torch import Tensor

from offsite.kernels.cka import adjacent_cka, linear_cka

MARGIN = 0.1
SIDE = 3  # links on either side of the border that may change places
BEAM = 8  # ways that are followed at once
FLOOR = 1e-6  # layers that are less unlike than this are equal

Kept = tuple[int, ...]


@dataclass(frozen=True)
class Ways:
    """Ways to keep layers, by number, with the strain of each; the first has none."""

    links: tuple[float, ...]  # CKA of each layer with the next
    gap: float  # log of the ratio of what was told apart at the border; infinite if there was nothing to choose
    margin: float
    strains: dict[Kept, float]


def cluster(representations: Tensor, keep: int) -> Ways:
    """Keep `keep` layers of (layers, n, d): the middle ones, or the upper of two, of the segments between weak links.

    The paper merges the most similar neighbours again and again; as the score is that of the two layers at the border,
    and never changes, cutting at the smallest links gives the same segments.
    """
    links = adjacent_cka(representations).tolist()
    gap, margin, cuts = weakest(links, keep - 1)
    strains: dict[Kept, float] = {}
    for cut, strain in cuts.items():
        borders = [0, *(at + 1 for at in cut), len(links) + 1]
        kept = tuple((start + stop) // 2 for start, stop in pairwise(borders))
        strains[kept] = min(strain, strains.get(kept, math.inf))
    return Ways(tuple(links), gap, margin, strains)


def weakest(links: list[float], count: int) -> tuple[float, float, dict[Kept, float]]:
    """Return the gap, the margin, and the ways to choose the `count` smallest links, of equal ones the first."""
    unlike = [_unlike(link) for link in links]
    order = sorted(range(len(links)), key=lambda at: (-unlike[at], at))
    cut, joined = order[:count], order[count:]
    if not cut or not joined:
        return math.inf, MARGIN, {tuple(sorted(cut)): 0.0}
    below = {at: unlike[at] - unlike[joined[0]] for at in cut}
    above = {at: unlike[cut[-1]] - unlike[at] for at in joined}
    near = ([at for at in cut if below[at] < MARGIN][-SIDE:], [at for at in joined if above[at] < MARGIN][:SIDE])
    margin = min([MARGIN, *(far for at, far in (below | above).items() if at not in near[0] + near[1])])
    sure, usual = set(cut) - set(near[0]), sum(unlike[at] for at in near[0])
    ways: dict[Kept, float] = {}
    for chosen in combinations(near[0] + near[1], len(near[0])):  # the links' own choice first
        strain = usual - sum(unlike[at] for at in chosen)
        if not ways or strain < margin:
            ways[tuple(sorted({*sure, *chosen}))] = max(0.0, strain)
    return below[cut[-1]], margin, ways


def drop(representations: Tensor, keep: int) -> Ways:
    """Keep `keep` layers of (layers, n, d): drop the right one of the most similar neighbours until they are left."""
    depth, known = len(representations), dict[tuple[int, int], float]()

    def unlike(one: int, other: int) -> float:
        if (one, other) not in known:
            known[one, other] = _unlike(float(linear_cka(representations[one], representations[other])))
        return known[one, other]

    gap, margin, ways = math.inf, MARGIN, {tuple(range(depth)): 0.0}
    for _ in range(depth - keep):
        longer: dict[Kept, float] = {}
        for at, (kept, strain) in enumerate(ways.items()):
            links = [unlike(*pair) for pair in pairwise(kept)]
            if at == 0 and len(links) > 1:
                gap = min(gap, sorted(links)[1] - min(links))
            for place, link in enumerate(links):
                rest = kept[: place + 1] + kept[place + 2 :]
                longer[rest] = min(strain + link - min(links), longer.get(rest, math.inf))
        ranked = sorted(longer.items(), key=lambda way: (way[1], way[0]))
        margin = min([margin, *(strain for _, strain in ranked[BEAM : BEAM + 1])])
        ways = dict(ranked[:1]) | {kept: strain for kept, strain in ranked[:BEAM] if strain < margin}
    return Ways(tuple(adjacent_cka(representations).tolist()), gap, margin, ways)


def _unlike(link: float) -> float:
    return math.log(max(1 - link, FLOOR))
