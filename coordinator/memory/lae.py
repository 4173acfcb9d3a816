"""LAE: learning, accumulation, ensemble (Gao et al., ICCV 2023, arXiv 2303.10070).

An online adapter learns every task; an offline one follows it slowly, and so keeps more of the tasks before. After a
round of k optimiser steps

    W_off <- D W_off + (1 - D) W_on,    D = d^k,  d = 1 - c / N        (N: steps of the run, rounds x k)

over the changes W of the base's weights: products are averaged as products. The paper's d = 0.9999 is for some 10,000
steps, and so c, not d, is a setting: as much of what was is left after a run of any length, about exp(-c) of it.
The offline adapter begins as a copy of the version that a run goes on from, so that in the first task, before which
there is nothing to keep, both are the same and there is one. Either serves, or both: of each next token the larger of
their probabilities, normalised. Methods adapt alike where a run asks for a `speed` (`emulator.tuning.speed`); that the
paper freezes at a task's begin is for a new classifier's head, which no task has here.
"""

from dataclasses import replace
from typing import ClassVar, Literal

from offsite.coordinator.aggregation.base import Version
from offsite.coordinator.memory.averages import Averaging, average, kept, moving
from offsite.coordinator.memory.base import PREFIX, Combine, Moment
from offsite.kernels.schema import Schema, Tensors
from offsite.protos.documents import document

OFFLINE = PREFIX + "offline"


@document
class Lae(Averaging):
    """Keep a slow average of what the rounds give, beside the newest version."""

    name: ClassVar[str] = "lae"
    replaces: ClassVar[bool] = False
    c: float = 2.0  # how often the offline adapter would be replaced in a run, if its steps did not overlap
    rank: int = 0  # most ranks of its products; 0: as many as its average has, so that it is exact
    serve: Literal["ensemble", "offline", "online"] = "ensemble"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.c <= 0 or self.rank < 0:
            raise ValueError(f"c must be above 0 and rank at least 0, got {self.c:g} and {self.rank}")

    @property
    def combine(self) -> Combine:
        """See `Memory`."""
        return "max" if self.serve == "ensemble" else "one"

    def begin(self, last: Version, start: Version, schema: Schema, moment: Moment) -> Version:
        """Begin the offline adapter where a run goes on from another, unless that has one."""
        return replace(last, state={OFFLINE: last.adapter} | last.state) if moment.before else last

    def after(self, last: Version, new: Version, schema: Schema, moment: Moment) -> Version:
        """Have the offline adapter follow."""
        if OFFLINE not in last.state:
            return new
        share = 1.0 - self.kept(moment)
        offline = average(
            last.state[OFFLINE], new.adapter, dict.fromkeys(moving(schema), share), schema, rank=self.rank
        )
        return replace(new, state=new.state | {OFFLINE: offline}, figures=new.figures | {"offline_share": share})

    def kept(self, moment: Moment) -> float:
        """Return D, the share of the offline adapter that a round leaves; 0 where a run has no more than c steps."""
        return kept(self.c, moment)

    def experts(self, version: Version) -> dict[str, Tensors]:
        """Return both adapters, or the one that serves; in the first task they are the same."""
        online, offline = version.adapter, version.state.get(OFFLINE, version.adapter)
        if self.serve == "online" or (self.serve == "ensemble" and OFFLINE not in version.state):
            return {"online": online}
        return {"offline": offline} if self.serve == "offline" else {"online": online, "offline": offline}
