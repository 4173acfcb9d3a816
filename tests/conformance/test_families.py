"""What every plug-in of every family owes, run over the families' own dicts."""

from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation.base import Adapter
from offsite.emulator import builders, methods

FAMILIES: dict[str, tuple[dict[str, Any], Any]] = {
    "builder": (dict(builders.BUILDERS), builders.make),
    "method": (dict(methods.METHODS), methods.make),
    "strategy": (dict(aggregation.STRATEGIES), aggregation.make),
}
PLUG_INS = [(family, name) for family, (known, _) in FAMILIES.items() for name in known]
STRATEGIES = sorted(aggregation.STRATEGIES)


@pytest.mark.parametrize(("family", "name"), PLUG_INS)
def test_a_plug_in_is_a_frozen_dataclass_that_runs_on_its_defaults(family: str, name: str) -> None:
    known, make = FAMILIES[family]
    made = make(name, {})
    assert is_dataclass(made) and type(made) is known[name] and made.name == name
    setting = fields(made)[0].name if fields(made) else "anything"
    with pytest.raises((FrozenInstanceError, AttributeError)):
        setattr(made, setting, None)


@pytest.mark.parametrize(("family", "name"), PLUG_INS)
def test_an_unknown_setting_is_named(family: str, name: str) -> None:
    with pytest.raises(Exception, match="no_such_setting"):
        FAMILIES[family][1](name, {"no_such_setting": 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_name_is_answered_with_the_known_ones(family: str) -> None:
    known, make = FAMILIES[family]
    with pytest.raises(Exception, match=", ".join(sorted(known))):
        make("no-such-thing", {})


def updates(count: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"0.q.A": torch.randn(3, 10, generator=generator), "0.q.B": torch.randn(8, 3, generator=generator)}
        for _ in range(count)
    ]


def product(adapter: Adapter) -> torch.Tensor:
    return adapter["0.q.B"].double() @ adapter["0.q.A"].double()


@pytest.mark.parametrize("name", STRATEGIES)
def test_sites_that_agree_are_averaged_to_what_they_agree_on(name: str) -> None:
    only = updates(1)[0]
    fold = aggregation.make(name, {}).begin({})
    for weight in (0.5, 0.25, 0.25):
        fold.add(only, weight=weight)
    torch.testing.assert_close(product(fold.finish([3]).exact), product(only), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    outcomes = []
    for order in ([0, 1, 2], [2, 0, 1]):
        fold = aggregation.make(name, {}).begin({})
        for at in order:
            fold.add(updates(3)[at], weight=[0.5, 0.3, 0.2][at])
        outcomes.append(fold.finish([3]))
    torch.testing.assert_close(product(outcomes[0].exact), product(outcomes[1].exact), rtol=1e-5, atol=1e-5)
    sent = [outcome.broadcast[3] for outcome in outcomes]
    torch.testing.assert_close(product(sent[0]), product(sent[1]), rtol=1e-5, atol=1e-5)
