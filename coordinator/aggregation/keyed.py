"""Folding updates that hold only some groups of the adapter: each group is averaged over the sites that trained it.

    g* = sum_{k in S_g} p_k / P_g  g_k,   P_g = sum_{k in S_g} p_k        (S_g: the sites whose update has the group g)

Divided by the weight of all sites it would shrink. Groups with the same sites are folded together, by a fold of their
own; a group that nobody trained stays as it is, bit for bit, with all that is kept of it.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from offsite.coordinator.aggregation.base import Fold, Origin, Separable, Strategy, Version
from offsite.kernels.schema import Schema, TensorMap, Tensors, Tier, groups
from offsite.protos.errors import InputError

Update = tuple[Origin, AbstractContextManager[TensorMap]]  # opened as the adapter, or the part of it, it stands for


@dataclass(frozen=True)
class Share:
    """What a site has in a round."""

    weight: float  # those of a round sum to one
    groups: Collection[str]  # of the schema, that its update has


@dataclass
class _Class:
    """Groups that the same sites have trained, and their fold."""

    fold: Fold
    total: float  # weight of these sites


def is_partial(schema: Schema, shares: Mapping[str, Share]) -> bool:
    """Tell whether some update of a round lacks a group of the schema."""
    every = groups(schema).keys()
    return any(not every <= {*share.groups} for share in shares.values())


def fold_keyed(
    strategy: Strategy,
    last: Version,
    schema: Schema,
    updates: Iterable[Update],
    *,
    tiers: Collection[Tier],
    shares: Mapping[str, Share],
) -> Version:
    """Fold updates, which come in the order of the sites' names, each opened once; `shares` are theirs by site.

    Raises InputError where the strategy folds all groups together.
    """
    if not isinstance(strategy, Separable):
        raise InputError(f"strategy {strategy.name} folds all groups of tensors together, and these updates lack some")
    owners: dict[tuple[str, ...], Schema] = {}
    for group, keys in groups(schema).items():
        sites = tuple(site for site in sorted(shares) if group in shares[site].groups)
        owners.setdefault(sites, {}).update({key: schema[key] for key in keys})
    untouched = owners.pop((), {})
    running = {
        sites: _Class(strategy.begin(last, part), _total(sites, shares)) for sites, part in sorted(owners.items())
    }
    for origin, update in updates:
        with update as adapter:
            for sites, one in running.items():
                if origin.site in sites:
                    one.fold.add(adapter, replace(origin, weight=origin.weight / one.total))
    parts = [one.fold.finish(sorted(tiers)) for one in running.values()]
    if untouched:
        parts.append(_kept(last, untouched, tiers))
    return strategy.join(parts) if running and len(parts) > 1 else parts[0]


def _total(sites: tuple[str, ...], shares: Mapping[str, Share]) -> float:
    """Weight of some sites; of all of a round it is one, whatever the last digit of their sum is."""
    return 1.0 if len(sites) == len(shares) else sum(shares[site].weight for site in sites)


def _kept(last: Version, schema: Schema, tiers: Collection[Tier]) -> Version:
    """Return what the last version has of some tensors."""

    def of(tensors: Tensors) -> Tensors:
        return {key: tensor for key, tensor in tensors.items() if key in schema}

    state = {name: kept for name, tensors in last.state.items() if (kept := of(tensors))}
    return Version(of(last.adapter), {tier: of(last.broadcast[tier]) for tier in sorted(tiers)}, state)
