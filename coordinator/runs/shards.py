"""A step done in parts on several nodes: the bytes do not depend on how many there are. Imports no tensor library.

Sets of held-out data are measured apart, groups of tensors folded apart, and layers of an emulator encoded apart: each
by one node from beginning to end, so that no sum is taken in another order. What is put together is sorted by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.orders import Aggregate, Build, Divide, Encode, Encodings, Evaluate, Join, Order
from offsite.coordinator.runs.steps.results import Built, Division, Encoded, Evaluation, Folded
from offsite.coordinator.runs.versions import Version
from offsite.protos.documents import from_json, to_json

PART_BYTES = 64 << 20  # of updates, or of the base: less is done before another node has begun


def count(order: Order, spec: Grant, *, nodes: int, part: int = PART_BYTES) -> int:
    """Return in how many parts an order is done by so many nodes, each of at least `part` bytes."""
    match order:
        case Evaluate():
            return max(1, min(nodes, len(spec.evaluation)))
        case Build(encoded=None):
            return max(1, min(nodes, spec.weights // part))
        case Aggregate():
            size = sum(order.last.broadcast[order.tiers[update.site]].size for update in order.updates)
            return max(1, min(nodes, order.groups, size // part))
    return 1


def in_parts(order: Order, spec: Grant, parts: int, do: Callable[[Sequence[Order]], list[bytes]]) -> bytes:
    """Do an order in parts, and return what it would have given as a whole; `do` does several at once."""
    match order:
        case Evaluate() if parts > 1:
            names = sorted(spec.evaluation)
            results = do([replace(order, sets=tuple(names[part::parts])) for part in range(parts)])
            measured = [from_json(Evaluation, result, where="step evaluate") for result in results]
            scores = {name: score for one in measured for name, score in one.sets.items()}
            experts = {
                expert: dict(sorted((name, score) for one in measured for name, score in one.experts[expert].items()))
                for expert in measured[0].experts
            }
            spans = tuple(span for one in measured for span in one.spans)
            return to_json(Evaluation(sets=dict(sorted(scores.items())), experts=experts, spans=spans))
        case Aggregate() if parts > 1:
            bare = replace(order, last=order.last.bare, parts=parts)
            results = do([replace(bare, part=part) for part in range(parts)])
            folded = [from_json(Folded, result, where="step aggregate") for result in results]
            join = Join(
                last=order.last, schema=order.schema, round=order.round, parts=tuple(one.version for one in folded)
            )
            (whole,) = do([join])
            version = from_json(Version, whole, where="step join")
            spans = tuple(span for one in folded for span in one.spans)
            return to_json(replace(folded[0], version=version, spans=spans))
        case Build(encoded=None) if parts > 1:
            return _built(order, parts, do)
    return do([order])[0]


def _built(order: Build, parts: int, do: Callable[[Sequence[Order]], list[bytes]]) -> bytes:
    (begun,) = do([Divide(build=order)])
    division = from_json(Division, begun, where="step divide")
    if division.outline is None or division.weights is None:
        return to_json(division.built)
    parts = min(parts, division.places)
    encode = Encode(outline=division.outline, weights=division.weights, parts=parts, part=0)
    results = do([replace(encode, part=part) for part in range(parts)])
    encoded = [from_json(Encoded, result, where="step encode") for result in results]
    encodings = Encodings(outline=division.outline, parts=tuple(one.file for one in encoded))
    (whole,) = do([replace(order, encoded=encodings)])
    built = from_json(Built, whole, where="step build")
    spans = (*division.spans, *(span for one in encoded for span in one.spans), *built.spans)
    return to_json(replace(built, spans=spans))
