"""Every method with every builder that alters layers that train: they train so, or it is refused, as both declare."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest

from offsite.coordinator.runs import pairs
from offsite.emulator import builders, modality
from offsite.emulator.builders import BUILDERS, Material
from offsite.emulator.methods import METHODS, make
from offsite.emulator.methods.peft_hub import PeftMethod
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Ends
from offsite.emulator.plug import plug

ALTERING: list[Any] = [name for name, kind in BUILDERS.items() if getattr(kind, "alters", None)]
SETTINGS: dict[str, dict[str, Any]] = {  # with which they alter every layer of a tiny model
    "additive": {"layers": "all", "group": 4, "bits": 4, "steps": 0},
    "loram": {"first": 0, "last": 0},
    "quantised": {"layers": "all", "block": 16},
}
QUICK = {name for name, kind in METHODS.items() if not issubclass(kind, PeftMethod)} | {
    "vera"
}  # and one type of peft's
Build = Callable[[tuple[str, ...]], Draft]


@pytest.fixture
def build(tiny: Any) -> Build:
    def one(names: tuple[str, ...]) -> Draft:
        base = tiny(layers=3)
        batch = modality.default().probe(base, rows=2, length=8)
        chain = [builders.make(name, SETTINGS.get(name, {})) for name in names]
        return builders.run(chain, Ends(1, 1), base, Material(batches=[batch]))

    return cache(one)


def trains(name: str, draft: Draft, base: Any) -> bool:
    """Tell whether a method's adapter starts on an emulator, attaches, and comes back to the base."""
    method, places = make(name, {}), draft.outline.places
    try:
        method.fits(draft.model, places)
        start = method.start(draft.model, places, seed=0)
        attached = method.attach(deepcopy(draft.model), places, start)
        plug(base, method, method.recover(method.state(attached, places), draft.recovery))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("names", [QUICK, pytest.param(METHODS.keys() - QUICK, marks=pytest.mark.slow)])
@pytest.mark.parametrize("builder", ALTERING)
def test_a_method_trains_altered_layers_where_it_does_not_spare_them(
    builder: str, names: set[str], build: Build, tiny: Any
) -> None:
    kind: Any = BUILDERS[builder]
    stated, seen = {}, {}
    for name in sorted(names):
        method = METHODS[name]
        providers = [other for other, one in BUILDERS.items() if one.provides & method.needs and other != builder]
        chain = (builder,) if method.needs <= kind.provides else (builder, *providers[:1])
        try:
            draft = build(chain)
        except ValueError:  # both are of one stage
            continue
        provided = builders.provided([builders.make(one, SETTINGS.get(one, {})) for one in chain])
        stated[name] = name in pairs.trainers(provided, kind.alters)
        seen[name] = trains(name, draft, tiny(layers=3))
    assert seen and seen == stated
