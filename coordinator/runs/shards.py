"""A step done in parts on several nodes: the bytes do not depend on how many there are. Imports no tensor library.

Sets of held-out data are measured apart, and groups of tensors folded apart: each by one node from beginning to end, so
that no sum is taken in another order. What is put together is sorted by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.orders import Aggregate, Evaluate, Join, Order
from offsite.coordinator.runs.steps.results import Evaluation, Folded
from offsite.coordinator.runs.versions import Version
from offsite.protos.documents import from_json, to_json

PART_BYTES = 64 << 20  # of updates: to fold less is done before another node has begun


def count(order: Order, spec: Grant, *, nodes: int) -> int:
    """Return in how many parts an order is done by so many nodes."""
    match order:
        case Evaluate():
            return max(1, min(nodes, len(spec.evaluation)))
        case Aggregate():
            size = sum(order.last.broadcast[order.tiers[update.site]].size for update in order.updates)
            return max(1, min(nodes, order.groups, size // PART_BYTES))
    return 1


def in_parts(order: Order, spec: Grant, parts: int, do: Callable[[Sequence[Order]], list[bytes]]) -> bytes:
    """Do an order in parts, and return what it would have given as a whole; `do` does several at once."""
    match order:
        case Evaluate() if parts > 1:
            names = sorted(spec.evaluation)
            results = do([replace(order, sets=tuple(names[part::parts])) for part in range(parts)])
            measured = [from_json(Evaluation, result, where="step evaluate") for result in results]
            scores = {name: score for one in measured for name, score in one.sets.items()}
            spans = tuple(span for one in measured for span in one.spans)
            return to_json(Evaluation(sets=dict(sorted(scores.items())), spans=spans))
        case Aggregate() if parts > 1:
            results = do([replace(order, parts=parts, part=part) for part in range(parts)])
            folded = [from_json(Folded, result, where="step aggregate") for result in results]
            (whole,) = do([Join(parts=tuple(one.version for one in folded))])
            version = from_json(Version, whole, where="step join")
            spans = tuple(span for one in folded for span in one.spans)
            return to_json(replace(folded[0], version=version, spans=spans))
    return do([order])[0]
