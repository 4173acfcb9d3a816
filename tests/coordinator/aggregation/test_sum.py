"""The strategy that adds: what each site measured counts by itself, whoever was first and however it is divided."""

import itertools
from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Separable, Version
from offsite.coordinator.aggregation.folding import Sent, part_of, weigh
from offsite.emulator.methods import make
from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice, RunSpec

SCHEMA: Schema = {
    "0.q.inputs": Field("F32", (50,), Rule.SUM, "0.q"),
    "0.q.count": Field("F64", (1,), Rule.SUM, "0.q"),
    "5.q.squares": Field("F32", (6, 7), Rule.SUM, "5.q"),
}
ZEROS: Tensors = {
    key: torch.zeros(field.shape, dtype=torch.float64 if field.dtype == "F64" else torch.float32)  # type: ignore[arg-type]
    for key, field in SCHEMA.items()
}
BEGUN = Version(ZEROS, {"": ZEROS})
STRATEGY = aggregation.make("sum", {})


def update(seed: int, scale: float) -> Tensors:
    drawn = torch.Generator().manual_seed(seed)
    return {
        key: torch.full((1,), 3.0 + seed, dtype=torch.float64)
        if key.endswith("count")
        else scale * torch.randn(zero.shape, generator=drawn)
        for key, zero in ZEROS.items()
    }


UPDATES = {site: update(at, 10.0**at) for at, site in enumerate(("bank", "clinic", "school", "town"))}


def folded(sites: Any, schema: Schema = SCHEMA, last: Version = BEGUN) -> Version:
    running = STRATEGY.begin(last, schema)
    for site in sites:
        running.add(UPDATES[site], Origin(site, "", 0.25))
    return running.finish([""])


def test_it_is_the_sum_whatever_the_weights_and_sites_begin_from_zeros() -> None:
    version = folded(UPDATES)
    for key in SCHEMA:
        wanted = sum(one[key].double() for one in UPDATES.values())
        assert torch.equal(version.adapter[key], wanted.to(ZEROS[key].dtype))  # type: ignore[union-attr]
        assert torch.equal(version.broadcast[""][key], ZEROS[key])
    assert float(version.adapter["0.q.count"]) == 3 + 4 + 5 + 6


def test_neither_the_order_nor_a_division_into_parts_changes_a_bit() -> None:
    wanted = folded(UPDATES).adapter
    for sites in itertools.permutations(UPDATES):
        other = folded(sites).adapter
        assert all(torch.equal(wanted[key], other[key]) for key in SCHEMA)
    parts = [folded(UPDATES, part_of(SCHEMA, part, 2)) for part in range(2)]
    assert isinstance(STRATEGY, Separable)
    whole = STRATEGY.join(parts)
    assert whole.adapter.keys() == SCHEMA.keys() and all(torch.equal(wanted[key], whole.adapter[key]) for key in SCHEMA)


def test_a_later_round_adds_to_the_last() -> None:
    once = folded(["bank", "clinic"])
    twice = folded(["school", "town"], last=once).adapter
    wanted = folded(UPDATES).adapter
    for key in SCHEMA:
        torch.testing.assert_close(twice[key], wanted[key], rtol=1e-6, atol=0)


def test_another_shape_and_sums_that_are_not_finite_are_refused() -> None:
    running = STRATEGY.begin(BEGUN, SCHEMA)
    with pytest.raises(InputError, match=r"0.q.inputs of town: a sum of terms \[50\] does not take one of \[1\]"):
        running.add(UPDATES["town"] | {"0.q.inputs": torch.ones(1)}, Origin("town", "", 1.0))
    with pytest.raises(ValueError, match="F32.*is finite|integers"):
        Field("I32", (1,), Rule.SUM, below=4)


def test_a_site_with_many_rows_is_no_outlier_and_one_with_a_large_sum_for_few_is() -> None:
    spec = RunSpec(model="m", method=Choice(name="moments"), strategy=Choice(name="sum"))
    sent = [Sent(f"s{at}", "", 10 ** (at + 1), 3.0 * 10 ** (at + 1)) for at in range(4)]
    assert weigh(sent, spec=spec).left_out == {}
    odd = weigh([*sent, Sent("odd", "", 10, 300.0)], spec=spec).left_out
    assert [*odd] == ["odd"] and "median" in odd["odd"]


def test_the_sums_of_the_sites_are_those_of_the_pooled_data(tiny: Any, text: Any) -> None:
    for of in ("inputs", "gradients", "squares"):
        method: Any = make("moments", {"of": of})
        zeros = method.start(tiny(), {0: 0, 5: 5}, seed=0)

        def measured(batches: Any, method: Any = method, zeros: Any = zeros) -> Tensors:
            model = method.attach(tiny(), {0: 0, 5: 5}, zeros)
            for batch in batches:
                method.measure(model, {0: 0, 5: 5}, batch)
            return dict(method.state(model, {0: 0, 5: 5}))

        half = max(1, len(text) // 2)
        updates = [(Origin(name, "", 0.5), measured(part)) for name, part in (("a", text[:half]), ("b", text[half:]))]
        schema = method.schema(zeros)
        running = STRATEGY.begin(Version(zeros, {"": zeros}), schema)
        for origin, one in updates:
            running.add(one, origin)
        total, pooled = running.finish([""]).adapter, measured(text)
        for key, value in pooled.items():
            torch.testing.assert_close(total[key], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
