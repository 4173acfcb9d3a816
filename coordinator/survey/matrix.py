"""Which parts of a run go together, as tables: the same declarations that a submitted run is judged by."""

from dataclasses import dataclass

from offsite.coordinator import aggregation
from offsite.coordinator.memory import MEMORIES
from offsite.coordinator.runs import pairs
from offsite.emulator import builders
from offsite.emulator.builders import BUILDERS
from offsite.emulator.builders.base import STAGES, Builder
from offsite.emulator.methods import METHODS, Method
from offsite.emulator.optimisers import OPTIMISERS
from offsite.emulator.parts import PARTS
from offsite.emulator.retention import RETENTIONS, Retention
from offsite.kernels.schema import Rule
from offsite.protos import upload

Table = dict[str, dict[str, str]]  # row -> column -> what of the pair


@dataclass(frozen=True)
class Matrix:
    """All pairs of two families that bear on each other; an empty cell is a pair that is refused."""

    strategies: Table  # of methods: "exact", or "near" it
    builders: Table  # of methods
    merging: dict[str, bool]  # of methods: whether a merged model may be asked for
    stages: Table  # of an upload, by strategies
    parts: Table  # of an adapter, by strategies
    retentions: Table  # by methods, a method a row
    optimisers: Table  # by the engines of sites
    memories: Table  # by the rules of what methods train
    replacing: dict[str, bool]  # of memories: whether sites go on from what it made
    dividing: dict[str, bool]  # of memories: whether it keeps by task what is private
    private: list[str]  # the methods that have some of that
    order: dict[str, list[str]]  # of builders in a chain: stage -> its builders


def matrix() -> Matrix:
    """Ask every pair of the plug-ins that are installed and can be loaded."""
    methods, strategies = dict(sorted(METHODS.sound().items())), dict(sorted(aggregation.STRATEGIES.sound().items()))
    chain = dict(sorted(BUILDERS.sound().items(), key=lambda item: (STAGES.index(item[1].stage), item[0])))
    return Matrix(
        strategies={
            name: {
                other: ("exact" if pairs.is_exact(method, strategy) else "near") * (method.rules <= strategy.rules)
                for other, strategy in strategies.items()
            }
            for name, method in methods.items()
        },
        builders={
            name: {other: _trains(method, builder) for other, builder in chain.items()}
            for name, method in methods.items()
        },
        merging={name: method.mergeable for name, method in methods.items()},
        stages={
            name: {
                other: "yes" * (not stage.hides or strategy.needs == "sum") for other, strategy in strategies.items()
            }
            for name, stage in sorted(upload.STAGES.sound().items())
        },
        parts={
            name: {other: "yes" * pairs.folds(strategy, part) for other, strategy in strategies.items()}
            for name, part in sorted(PARTS.sound().items())
        },
        retentions={
            name: {other: _retains(method, held) for other, held in sorted(RETENTIONS.sound().items())}
            for name, method in methods.items()
        },
        optimisers={
            name: {"plain": "yes", "deepspeed": "yes" * (kind.elementwise and not kind.forward_only)}
            for name, kind in sorted(OPTIMISERS.sound().items())
        },
        memories={
            name: {rule: "yes" * (rule in kind.rules) for rule in Rule if rule is not Rule.LOCAL}
            for name, kind in sorted(MEMORIES.sound().items())
        },
        replacing={name: kind.replaces for name, kind in sorted(MEMORIES.sound().items())},
        dividing={name: kind.divides for name, kind in sorted(MEMORIES.sound().items())},
        private=pairs.private(),
        order={stage: [name for name, kind in chain.items() if kind.stage == stage] for stage in STAGES},
    )


def _retains(method: type[Method], held: type[Retention]) -> str:
    """Say with which strategies a retention holds what a method trains; nothing: with none."""
    if not pairs.retains(held, method):
        return ""
    folding = pairs.strategies(method)
    keeping = [name for name in folding if pairs.keeps_values(method, aggregation.STRATEGIES[name])]
    return "yes" if not held.valued or keeping == folding else f"with {', '.join(keeping)}" * bool(keeping)


def _trains(method: type[Method], builder: type[Builder]) -> str:
    """Say when a method trains on an emulator of a builder; nothing: never."""
    if missing := sorted(method.needs - builder.provides):
        others = [kind for kind in BUILDERS.sound().values() if missing[0] in kind.provides]
        apart = any(kind.stage != builder.stage for kind in others)
        return f"with {builders.providers(missing[0])}" * apart
    return "spared" if method.spares & getattr(builder, "alters", frozenset()) else "yes"
