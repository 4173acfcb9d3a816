"""The table of methods: what each states of itself, what follows from that, and what is measured of one layer."""

from dataclasses import dataclass
from typing import Any

from offsite.coordinator import aggregation
from offsite.coordinator.runs import pairs
from offsite.coordinator.survey.errors import errors
from offsite.emulator.builders import BUILDERS
from offsite.emulator.evaluation.size import measure
from offsite.emulator.methods import METHODS, Method
from offsite.emulator.methods.base import Formula


@dataclass(frozen=True)
class Row:
    """A method with its settings as they are by default; sizes are of one layer in the shapes of SmolLM2-135M."""

    name: str
    source: str  # "package.module:class"
    kind: str
    paper: str
    formula: str
    values: int  # that train
    update_bytes: int  # on the wire, as no stage packs them
    training_bytes: int  # memory of what trains, its gradients and moments
    tensors: dict[str, str]  # a part's name -> its dtype and how it is averaged
    exact: list[str]  # the strategies that make the mean of the changes
    near: list[str]  # those that make an approximation
    errors: dict[str, float]  # of these, where they were measured (see `errors`)
    mergeable: bool
    seeded: bool
    needs: list[str]  # builders, of which one must be in the chain
    spares: list[str]  # builders that must leave the layers that train as they are
    rate: float


def survey(*, measured: bool = False) -> tuple[list[Row], list[str]]:
    """Return the rows of all methods, by name, and why other plug-ins have none; `measured` ones have their errors."""
    rows, faults = [], METHODS.unsound()
    for name, kind in sorted(METHODS.sound().items()):
        try:
            rows.append(_row(METHODS.make(name, {}), measured=measured))
        except ValueError as error:
            faults.append(f"method {name!r} ({kind.__module__}) does not train a layer of SmolLM2-135M: {error}")
    return rows, faults


def _row(method: Method, *, measured: bool) -> Row:
    kind, size = type(method), measure(method)
    strategies = {name: aggregation.STRATEGIES[name] for name in pairs.strategies(method)}
    exact = [name for name, strategy in strategies.items() if pairs.is_exact(method, strategy)]
    near = [name for name in strategies if name not in exact]
    altering: list[tuple[str, Any]] = list(BUILDERS.sound().items())
    return Row(
        name=method.name,
        source=f"{kind.__module__}:{kind.__qualname__}",
        kind=method.kind.value,
        paper=method.paper,
        formula=_formula(method.formula),
        values=size.values,
        update_bytes=size.update_bytes,
        training_bytes=size.training_bytes,
        tensors={part: f"{dtype} {rule}" for part, (dtype, rule) in sorted(size.tensors.items())},
        exact=exact,
        near=near,
        errors=errors(method, near) if measured and near else {},
        mergeable=method.mergeable,
        seeded=method.seeded,
        needs=sorted(name for name, builder in BUILDERS.sound().items() if builder.provides & method.needs),
        spares=sorted(name for name, builder in altering if getattr(builder, "alters", frozenset()) & method.spares),
        rate=method.rate,
    )


def _formula(formula: Formula) -> str:
    return f"{formula.values}, each {formula.each}" + (f"; {formula.once}, once" if formula.once else "")


def emulators(row: Row) -> str:
    """Say in words on which emulators a method trains."""
    needs = f"of {' or '.join(row.needs)}" if row.needs else "any"
    return needs + f" but {', '.join(row.spares)} where it trains" * bool(row.spares)


def approximations(row: Row) -> str:
    """Name the strategies that are near, those of one error together, and the error if it was measured."""
    together: dict[str, list[str]] = {}
    for name in row.near:
        together.setdefault(f"{row.errors[name]:.1g}" if name in row.errors else "", []).append(name)
    return "; ".join(", ".join(names) + f": {error}" * bool(error) for error, names in together.items()) or "none"
