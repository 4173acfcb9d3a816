"""Which parts of a run go together, by what each declares: what `legality` refuses by, and its alternatives."""

from collections.abc import Collection

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Strategy
from offsite.coordinator.memory import MEMORIES, Memory
from offsite.emulator import methods, optimisers
from offsite.emulator.methods import Method
from offsite.emulator.methods.base import Sharing
from offsite.emulator.parts import PARTS, Part
from offsite.emulator.retention import RETENTIONS, Retention
from offsite.kernels.schema import Rule


def strategies(
    method: Method | type[Method],
    *,
    mixed: bool = False,
    summing: bool = False,
    part: Part | type[Part] | None = None,
    linear: bool = False,
) -> list[str]:
    """Name the strategies that fold what a method trains.

    At `mixed` tiers, given no more than the updates' sum, where updates have a part of an adapter, or come late.
    """
    return sorted(
        name
        for name, kind in aggregation.STRATEGIES.sound().items()
        if method.rules <= kind.rules and kind.mixed_tiers >= mixed and (kind.needs == "sum") >= summing
        if kind.linear >= linear
        if part is None or folds(kind, part)
    )


def folds(strategy: Strategy | type[Strategy], part: Part | type[Part]) -> bool:
    """Tell whether a strategy folds updates of a part: those that lack groups need one that folds groups apart."""
    return not part.partial or hasattr(strategy, "join")


def alike(strategy: Strategy | type[Strategy]) -> list[str]:
    """Name the parts that are the same at all sites of a round, as they are without settings, and that are folded."""
    return sorted(name for name, kind in PARTS.sound().items() if folds(strategy, kind) and PARTS.make(name, {}).alike)


def retains(retention: Retention | type[Retention], method: Method | type[Method]) -> bool:
    """Tell whether a retention can hold what a method trains to what it was."""
    if not retention.active:
        return True
    trains = not hasattr(method, "gives")
    return trains and method.rules <= retention.rules and (not retention.needs or bool(method.rules & retention.needs))


def keeps_values(method: Method | type[Method], strategy: Strategy | type[Strategy]) -> bool:
    """Tell whether a value means the same in each version: an exact mean of products is written in factors anew."""
    return Rule.PRODUCT not in method.rules or Rule.PRODUCT not in strategy.exact


def keeping(method: Method | type[Method]) -> list[str]:
    """Name the strategies that fold what a method trains, and with which it is so."""
    return [name for name in strategies(method) if keeps_values(method, aggregation.STRATEGIES[name])]


def retentions(method: Method, strategy: Strategy) -> list[str]:
    """Name the retentions that go with a method and a strategy."""
    return sorted(
        name
        for name, kind in RETENTIONS.sound().items()
        if retains(kind, method) and (not kind.valued or keeps_values(method, strategy))
    )


def unaligned() -> list[str]:
    """Name the optimisers with which each site may train another part."""
    return sorted(name for name, kind in optimisers.OPTIMISERS.sound().items() if not kind.aligned)


def is_exact(method: Method | type[Method], strategy: Strategy | type[Strategy]) -> bool:
    """Tell whether a strategy makes of adapters the one that changes the model by the mean of their changes."""
    return method.linear and method.rules <= strategy.exact


def is_private(method: Method | type[Method]) -> bool:
    """Tell whether layers share what a method trains, and each has some of it to itself."""
    return isinstance(method, Sharing) and method.private > 0


def private() -> list[str]:
    """Name the methods that are so."""
    return sorted(name for name, kind in methods.METHODS.sound().items() if is_private(kind))


def remembers(
    memory: Memory | type[Memory], method: Method | type[Method], strategy: Strategy | type[Strategy]
) -> bool:
    """Tell whether a memory can accumulate what a method trains, and sites go on from that if it has them do so.

    A strategy that is not exact by some rule makes of one adapter another. A method that carries another's adapter
    hands on what is remembered of that.
    """
    if (memory.divides and not is_private(method)) or (memory.accumulates and hasattr(method, "carries")):
        return False
    return method.rules <= memory.rules and (not memory.replaces or method.rules <= strategy.exact)


def memories(method: Method | type[Method], strategy: Strategy | type[Strategy]) -> list[str]:
    """Name the memories that can accumulate what a method trains and a strategy folds."""
    return sorted(name for name, kind in MEMORIES.sound().items() if remembers(kind, method, strategy))


def trainers(provided: Collection[str], altered: Collection[str] = ()) -> list[str]:
    """Name the methods that find in an emulator what they train, where layers that train are altered so."""
    return sorted(
        name
        for name, kind in methods.METHODS.sound().items()
        if kind.needs <= {*provided} and kind.spares.isdisjoint(altered)
    )


def measuring() -> list[str]:
    """Name the methods of which nothing trains, and from whose versions others begin."""
    return sorted(name for name, kind in methods.METHODS.sound().items() if hasattr(kind, "gives"))
