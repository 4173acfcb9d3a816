"""Folding the updates of a round into the next version."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation.outliers import Change, outliers
from offsite.coordinator.bundles.stored import distance, store_adapter
from offsite.coordinator.home import Home
from offsite.coordinator.runs.steps.orders import Aggregate
from offsite.coordinator.runs.steps.results import Folded, Part
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.store.blobs import Stored
from offsite.emulator import methods
from offsite.protos import tensors
from offsite.protos.errors import MismatchError, RunError
from offsite.protos.ranges import finite
from offsite.protos.spec import RunSpec


def aggregate(home: Home, spec: RunSpec, order: Aggregate) -> Folded:
    """Fold the updates of a round, in the order of the sites' names, and store the next version.

    Those far larger than the others are left out, and named; raises RunError if too few are left.
    """
    timeline = Timeline()
    blobs = home.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    with timeline.span("aggregation"), TemporaryDirectory(dir=home.scratch) as scratch:
        changes = {
            update.site: Change(
                distance(blobs, update.digest, order.broadcast[update.site].digest), method.rank_at(update.site)
            )
            for update in order.updates
        }
        left_out = outliers(changes, ratio=spec.max_update_ratio)
        updates = [update for update in order.updates if update.site not in left_out]
        if len(updates) < spec.min_sites:
            why = "; ".join(f"{site}: {reason}" for site, reason in left_out.items())
            raise RunError(f"{len(updates)} of at least {spec.min_sites} updates are left in the round ({why})")
        kept = {int(rank): tensors.load(blobs.path(digest)) for rank, digest in order.residual.items()}
        fold = strategy.begin(kept)
        total = sum(update.examples for update in updates)
        for update in sorted(updates, key=lambda update: update.site):
            fold.add(tensors.load(blobs.path(update.digest)), weight=update.examples / total)
        outcome = fold.finish(sorted({method.rank_at(site) for site in order.sites}))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in outcome.exact.values()):
            raise MismatchError("the average of the updates is not finite; lower max_update_norm and look at the sites")

        def store(name: str, adapters: dict[int, dict[str, torch.Tensor]]) -> dict[int, Stored]:
            return {
                rank: store_adapter(blobs, Path(scratch) / f"{name}-{rank}.safetensors", adapter)
                for rank, adapter in adapters.items()
            }

        sent, rest = store("broadcast", outcome.broadcast), store("residual", outcome.residual)
        exact = store_adapter(blobs, Path(scratch) / "exact.safetensors", outcome.exact)
    return Folded(
        broadcast={site: sent[method.rank_at(site)] for site in order.sites},
        exact=exact.digest,
        residual={str(rank): stored.digest for rank, stored in rest.items()},
        lineage={update.site: Part(update=update.digest, weight=update.examples / total) for update in updates},
        left_out=left_out,
        figures={name: finite(figure) for name, figure in outcome.figures.items()},
        spans=tuple(timeline),
    )
