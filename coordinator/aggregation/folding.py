"""One round's updates become the next version, wherever they are kept: in files, or in a simulation's spool."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass
from itertools import islice

import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation.base import Separable, Strategy, Together, Version
from offsite.coordinator.aggregation.keyed import Share, Update, fold_keyed, is_partial
from offsite.coordinator.aggregation.lateness import called, discount
from offsite.coordinator.aggregation.outliers import Change, outliers
from offsite.kernels.schema import Rule, Schema, Tier, groups
from offsite.protos.errors import MismatchError, RunError
from offsite.protos.spec import RunSpec

TOGETHER = 16  # updates that are open at once, where a fold takes several


@dataclass(frozen=True)
class Sent:
    """An update that was let in."""

    site: str
    tier: Tier
    examples: int  # that it saw: its weight
    norm: float  # L2 norm of the change since its broadcast
    age: int = 0  # rounds since the one that it was asked for in

    @property
    def whom(self) -> str:
        """Return what it is called among the updates of a round, which may have two of a site."""
        return called(self.site, self.age)


@dataclass(frozen=True)
class Weighing:
    """Who is in a version."""

    weights: dict[str, float]  # by what updates are called, in that order
    left_out: dict[str, str]  # likewise, why one is not in it


def weigh(sent: Sequence[Sent], *, spec: RunSpec) -> Weighing:
    """Say what each update of a round weighs; those far larger than the others are left out, and named.

    Sums are as large as what they are of, and are compared for each example. Late ones weigh less. Raises RunError if
    too few are left.
    """
    sums = Rule.SUM in aggregation.make(spec.strategy.name, spec.strategy.settings).rules
    changes = {one.whom: Change(one.norm / one.examples if sums else one.norm, one.tier) for one in sent}
    left_out = outliers(changes, ratio=spec.max_update_ratio)
    taken = sorted((one.whom, one.examples * discount(one.age)) for one in sent if one.whom not in left_out)
    if len(taken) < spec.min_sites:
        why = "; ".join(f"{whom}: {reason}" for whom, reason in left_out.items())
        raise RunError(f"{len(taken)} of at least {spec.min_sites} updates are left in the round ({why})")
    total = sum(examples for _, examples in taken)
    return Weighing({whom: examples / total for whom, examples in taken}, left_out)


def part_of(schema: Schema, part: int, parts: int) -> Schema:
    """Return the tensors that are folded together in one of several parts."""
    mine = sorted(groups(schema).items())[part::parts]
    return {key: schema[key] for _, keys in mine for key in keys}


def fold(
    strategy: Strategy,
    last: Version,
    schema: Schema,
    updates: Iterable[Update],
    *,
    tiers: Iterable[Tier],
    shares: Mapping[str, Share] | None = None,
) -> Version:
    """Fold updates, which come in the order of the sites' names, on top of the last version.

    `tiers` are those of the sites that may train next; `shares` say by site what its update has, where some may lack
    groups. Raises MismatchError for an average that is not finite.
    """
    if shares and is_partial(schema, shares):
        version = fold_keyed(strategy, last, schema, updates, tiers=sorted(tiers), shares=shares)
    else:
        version = _fold_whole(strategy, last, schema, updates, tiers)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in version.adapter.values()):
        raise MismatchError("the average of the updates is not finite; lower max_update_norm and look at the sites")
    return version


def fold_apart(
    strategy: Strategy,
    last: Version,
    schema: Schema,
    updates: Callable[[], Iterable[Update]],
    threads: int,
    *,
    tiers: Collection[Tier],
    shares: Mapping[str, Share] | None = None,
) -> Version:
    """Fold by so many threads, each of which asks for the updates and folds some groups: the bytes are those of `fold`.

    One thread folds all groups of a strategy that folds them together.
    """
    parts = min(threads, len(groups(schema)))
    if parts < 2 or not isinstance(strategy, Separable):
        return fold(strategy, last, schema, updates(), tiers=tiers, shares=shares)

    def part(number: int) -> Version:
        return fold(strategy, last, part_of(schema, number, parts), updates(), tiers=tiers, shares=shares)

    with ThreadPoolExecutor(parts, thread_name_prefix="fold") as pool:
        work = [pool.submit(copy_context().run, part, number) for number in range(parts)]
        return strategy.join([one.result() for one in work])


def _fold_whole(
    strategy: Strategy, last: Version, schema: Schema, updates: Iterable[Update], tiers: Iterable[Tier]
) -> Version:
    running = strategy.begin(last, schema)
    if isinstance(running, Together):
        waiting = iter(updates)
        while some := list(islice(waiting, TOGETHER)):
            with ExitStack() as files:
                running.add_together([(files.enter_context(update), origin) for origin, update in some])
    else:
        for origin, update in updates:
            with update as adapter:
                running.add(adapter, origin)
    return running.finish(sorted(tiers))
