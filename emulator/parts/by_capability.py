"""Shards by capability: a site trains as many shards of the adapter in a round as it can carry, and others in the next.

What trains is cut into shards of about as many values each, layer by layer, in whole maps or the groups that a method
makes of all of their tensors, as `mos` does. They stand in a ring: a site that is named begins where the one before it
ends, by name, and in each round all go on by as many shards as the least site carries. So sites that carry no more than
there are together never train the same shard in a round, and each has trained all of them by the time that the least
one has. What a site carries the run says, and the site is told of no other; its own policy bounds the bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any, ClassVar

from offsite.emulator.parts.base import Turn, by_layer, refuse_choice, units
from offsite.kernels.schema import Schema, groups


@dataclass(frozen=True)
class ByCapability:
    """Cut an adapter into shards, and hand a site as many as it can carry."""

    shards: int = 4
    carries: int = 1  # how many a site has that is not named below
    first: int = 0  # the shard that such a site begins with
    step: int = 0  # how many shards all go on by in a round; 0: as many as the least site carries
    sites: dict[str, int] = field(default_factory=dict)  # site -> how many it carries

    name: ClassVar[str] = "by-capability"
    partial: ClassVar[bool] = True
    starts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.shards < 2:
            raise ValueError(f"shards must be at least 2, got {self.shards}")
        if not 0 <= self.first < self.shards:
            raise ValueError(f"first must be one of the shards 0..{self.shards - 1}, got {self.first}")
        for what, carries in (("carries", self.carries), *((f"sites: {site!r}", n) for site, n in self.sites.items())):
            if not 1 <= carries <= self.shards:
                raise ValueError(f"{what} must be in 1..{self.shards}, the number of shards, got {carries}")

        if not 0 <= self.step <= self._least:
            raise ValueError(
                f"step must be in 0..{self._least}, what the least site carries, or some shards would never have their "
                f"turn, got {self.step}"
            )

    @property
    def _least(self) -> int:
        return min([self.carries, *self.sites.values()])

    @property
    def alike(self) -> bool:
        """Whether all sites of a round train the same: they do unless some are named."""
        return not self.sites

    def settings_at(self, site: str) -> dict[str, Any]:
        """See `base.Allotting`."""
        carries, first = self.carries, self.first
        if site in self.sites:
            before = sum(carried for other, carried in self.sites.items() if other < site)
            carries, first = self.sites[site], before % self.shards
        return {"shards": self.shards, "carries": carries, "first": first, "step": self.step or self._least}

    def fits(self, schema: Schema) -> None:
        """Raise ValueError if the adapter has fewer groups than shards, or every site carries all of it."""
        if self._least == self.shards:
            raise ValueError(
                f"part by-capability leaves nothing out, for all sites carry all {self.shards} shards; use part all"
            )
        self._cut(schema)

    def groups(self, schema: Schema, turn: Turn, chosen: Sequence[int] = ()) -> frozenset[str]:
        """Return the groups of the shards whose turn it is at the site; raises ValueError."""
        refuse_choice(self, chosen)
        cut, own = self._cut(schema), ByCapability(**self.settings_at(turn.site))
        begin = own.first + turn.round * own.step
        return frozenset(group for at in range(own.carries) for group in cut[(begin + at) % self.shards])

    def _cut(self, schema: Schema) -> list[list[str]]:
        """Return the groups of each shard, none of which is empty: one ends where it has its share of what is left."""
        own, common = by_layer(schema)
        keys = groups(schema)
        together = units(schema, [*common, *chain.from_iterable(own.values())])
        if len(together) < self.shards:
            raise ValueError(
                f"part by-capability cuts an adapter into {self.shards} shards, and this one has {len(together)} maps "
                "or groups of tensors; ask for fewer shards, or use a method or layers with more of them"
            )
        # Open sizes are left out, so that sites of all tiers have the same shards: both factors of a product have one.
        sizes = [
            sum(prod(filter(None, schema[key].shape)) for group in unit for key in keys[group])
            for unit in together.values()
        ]
        rest, size, cut = sum(sizes), 0, list[list[str]]([[]])
        for left, unit, more in zip(range(len(together) - 1, -1, -1), together.values(), sizes, strict=True):
            cut[-1] += unit
            size += more
            wanting = self.shards - len(cut)
            if wanting and (size * (wanting + 1) >= rest or left == wanting):
                cut.append([])
                rest, size = rest - size, 0
        return cut
