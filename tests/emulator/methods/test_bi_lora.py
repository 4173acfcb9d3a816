"""Bi-LoRA: a round begins with what was sent, latent values learn through their codes, and an update is small."""

from typing import Any

import pytest
import torch

from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.requantise import Requantise
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.methods import Adapter, Method, make
from offsite.emulator.methods.bi_lora import Binary
from offsite.emulator.plug import load, plug
from offsite.kernels.schema import settle, size_bytes

PLACES = {0: 0, 4: 4}
KEY = "4.mlp.up_proj"


@pytest.fixture(params=[1, 2])
def method(request: pytest.FixtureRequest) -> Method:
    return make("bi-lora", {"rank": 4, "alpha": 4.0, "bits": request.param})


def learned(method: Method, model: Any, *, seed: int = 1) -> Adapter:
    """An adapter whose latent values have moved."""
    draw = torch.Generator().manual_seed(seed)
    attached = method.attach(model, PLACES, method.start(model, PLACES, seed=0))
    with torch.no_grad():
        for latent in method.named_parameters(attached, PLACES).values():
            latent.add_(0.1 * torch.randn(latent.shape, generator=draw))
    return method.state(attached, PLACES)


def test_a_round_begins_with_the_model_that_was_sent_and_without_a_step_sends_it_back(
    method: Method, tiny: Any, ids: torch.Tensor
) -> None:
    adapter, base = learned(method, tiny()), tiny()
    model = method.attach(tiny(), PLACES, adapter)
    assert all(torch.equal(tensor, adapter[key]) for key, tensor in method.state(model, PLACES).items())
    method.merge(base, adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(ids).logits, tiny()(ids).logits)


def test_what_trains_is_what_leaves(method: Method, tiny: Any, ids: torch.Tensor) -> None:
    draw, model = torch.Generator().manual_seed(2), method.attach(tiny(), PLACES, learned(method, tiny()))
    with torch.no_grad():
        for latent in method.named_parameters(model, PLACES).values():
            latent.mul_(1.5).add_(0.05 * torch.randn(latent.shape, generator=draw))
        again = method.attach(tiny(), PLACES, method.state(model, PLACES))
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_factor_has_as_many_values_as_it_has_bits_for(method: Any, tiny: Any) -> None:
    model = method.attach(tiny(), PLACES, learned(method, tiny()))
    wrapped: Any = layers(model)[4].get_submodule("mlp.up_proj")
    assert isinstance(wrapped, Binary)
    for name in "AB":
        assert len(wrapped._rounded(name).unique()) == 2**method.bits
        assert len(wrapped.get_parameter(name).unique()) == 2**method.bits, "a round begins with what codes stand for"


def test_the_gradient_goes_straight_through_the_rounding_and_through_mean_and_deviation(method: Any, tiny: Any) -> None:
    wrapped: Any = layers(method.attach(tiny(), PLACES, learned(method, tiny())))[4].get_submodule("mlp.up_proj")
    latent, towards = wrapped.get_parameter("A"), torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        latent.add_(0.05 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(4)))
    (wrapped._rounded("A") * towards).sum().backward()
    mean, deviation = wrapped.anchors["A"].line(latent.detach())
    z = (latent.detach() - mean) / deviation
    level = (wrapped._rounded("A").detach() - mean) / deviation
    grown = wrapped.anchors["A"].factor * (latent.detach() - latent.detach().mean())
    grown = grown / (latent.numel() * latent.detach().std(correction=0))  # of the deviation, by each value
    expected = towards + (towards * (level - z)).sum() * grown
    torch.testing.assert_close(latent.grad, expected, rtol=1e-4, atol=1e-5)


def test_an_update_is_a_thirtieth_of_what_it_is_in_fp32(tiny: Any) -> None:
    method = make("bi-lora", {"rank": 32})
    start = method.start(tiny(), PLACES, seed=0)
    schema = settle(method.schema(start), {key: tensor.shape for key, tensor in start.items()})
    large = [group for group in {field.group for field in schema.values() if field.group} if ".mlp." in group]
    for group in large:
        fields = [field for field in schema.values() if field.group == group]
        values = sum(field.trained for field in fields)
        assert size_bytes(dict(enumerate(fields))) == -(-values // 8) + 8  # type: ignore[arg-type]
    assert large and (4 * 32 * 1536) / (-(-32 * 1536 // 8) + 8) > 31


def test_two_sites_average_and_the_mean_goes_into_the_base_as_lora(
    method: Method, tiny: Any, ids: torch.Tensor, tmp_path: Any
) -> None:
    start = method.start(tiny(), PLACES, seed=0)
    fold = Requantise().begin(Version(start, {"": start}), method.schema(start))
    for number, weight in ((1, 0.75), (2, 0.25)):
        fold.add(learned(method, tiny(), seed=number), Origin(f"site-{number}", "", weight))
    version = fold.finish([""])
    assert 0 < version.figures["residual"] < 1
    method.export(tmp_path, version.adapter, base=tiny(), base_name="base")
    with torch.no_grad():
        loaded = load(tiny(), tmp_path)(ids).logits  # by peft, as any LoRA
        torch.testing.assert_close(loaded, plug(tiny(), method, version.adapter)(ids).logits, rtol=1e-4, atol=1e-4)


def test_codes_of_another_map_are_refused(method: Method, tiny: Any) -> None:
    adapter = learned(method, tiny())
    turned = adapter | {f"{KEY}.size": adapter[f"{KEY}.size"].flip(0)}
    with pytest.raises(
        ValueError, match=rf"'{KEY}.size': \(32, 48\) is not that of the map, \(d_out, d_in\) = \(48, 32\)"
    ):
        method.merge(tiny(), turned)
