"""Folding the updates of a round into the next version."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin
from offsite.coordinator.aggregation.outliers import Change, outliers
from offsite.coordinator.home import Home
from offsite.coordinator.runs.steps.orders import Aggregate
from offsite.coordinator.runs.steps.results import Folded, Part
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.coordinator.runs.versions import read_schema
from offsite.protos import upload
from offsite.protos.errors import MismatchError, RunError
from offsite.protos.spec import RunSpec
from offsite.protos.upload.files import distance, opened


def aggregate(home: Home, spec: RunSpec, order: Aggregate) -> Folded:
    """Fold the updates of a round, in the order of the sites' names, and store the next version.

    Those far larger than the others are left out, and named; raises RunError if too few are left.
    """
    timeline = Timeline()
    blobs = home.blobs()
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    with timeline.span("aggregation"), TemporaryDirectory(dir=home.scratch) as scratch:
        schema, stages = read_schema(blobs, order.schema), upload.make(spec.upload)
        starts = {tier: blobs.path(sent.digest) for tier, sent in order.last.broadcast.items()}
        files = {update.site: blobs.path(update.digest) for update in order.updates}
        changes = {
            site: Change(distance(file, starts[order.tiers[site]], schema, stages), order.tiers[site])
            for site, file in files.items()
        }
        left_out = outliers(changes, ratio=spec.max_update_ratio)
        updates = [update for update in order.updates if update.site not in left_out]
        if len(updates) < spec.min_sites:
            why = "; ".join(f"{site}: {reason}" for site, reason in left_out.items())
            raise RunError(f"{len(updates)} of at least {spec.min_sites} updates are left in the round ({why})")
        fold = strategy.begin(load_version(blobs, order.last), schema)
        total = sum(update.examples for update in updates)
        for update in sorted(updates, key=lambda update: update.site):
            origin = Origin(update.site, order.tiers[update.site], update.examples / total)
            with opened(files[update.site], starts[origin.tier], schema, stages) as adapter:
                fold.add(adapter, origin)
        version = fold.finish(sorted({*order.tiers.values()}))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in version.adapter.values()):
            raise MismatchError("the average of the updates is not finite; lower max_update_norm and look at the sites")
        stored = store_version(blobs, Path(scratch), version)
    return Folded(
        version=stored,
        lineage={update.site: Part(update=update.digest, weight=update.examples / total) for update in updates},
        left_out=left_out,
        spans=tuple(timeline),
    )
