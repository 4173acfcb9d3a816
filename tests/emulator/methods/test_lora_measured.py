"""Starts that are made of what sites measured: those of the papers, whoever held which rows, on an untouched base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.emulator.anatomy.structure import is_transposed, layers
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import Measuring, Place, factors
from offsite.emulator.methods.measured import GAMMA, STARTS, damped
from offsite.emulator.methods.sums import Statistics
from offsite.kernels.schema import Rule

PLACES = {0: 0, 1: 5}
LAYERS = 2


def model(tiny: Any, family: str = "llama") -> Any:
    """A model whose weights are bf16's already, so that rounding to it changes nothing."""
    return tiny(family, layers=LAYERS).to(torch.bfloat16).float()


def measured(base: Any, batches: list[Any], of: str) -> Adapter:
    method = make("moments", {"of": of})
    assert isinstance(method, Measuring)
    attached = method.attach(base, PLACES, method.start(base, PLACES, seed=0))
    for batch in batches:
        method.measure(attached, PLACES, batch)
    return method.state(attached, PLACES)


def begun(init: str, base: Any, statistics: Adapter, **settings: Any) -> Adapter:
    method: Any = make("lora", {"init": init, "rank": 4, "alpha": 6.0} | settings)
    adapter: Adapter = method.begin(base, PLACES, statistics, seed=0)
    return adapter


def weight(base: Any, place: Place) -> Tensor:
    at = next(position for position, layer in PLACES.items() if layer == place.layer)
    linear = layers(base)[at].get_submodule(place.path)
    own: Tensor = linear.get_parameter("weight").detach()
    return (own.T if is_transposed(linear) else own).double()


def pairs(adapter: Adapter) -> Any:
    return factors({key: value for key, value in adapter.items() if not key.endswith("0")})


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_start_changes_no_bit_of_the_base_and_is_the_one_that_its_run_would_have_of_random_values_in_size(
    init: str, family: str, tiny: Any, text: list[Any], ids: Tensor, tmp_path: Path
) -> None:
    method: Any = make("lora", {"init": init, "rank": 4, "alpha": 6.0})
    adapter = begun(init, model(tiny, family), measured(model(tiny, family), text, method.takes))
    start = method.start(model(tiny, family), PLACES, seed=0)
    assert {key: value.shape for key, value in adapter.items()} == {key: value.shape for key, value in start.items()}
    ruled = {field.rule for field in method.schema(adapter).values()}
    assert ruled == method.rules == {Rule.PRODUCT} | ({Rule.FIXED} if init != "eva" else set())
    base = {0: 0, 5: 5}
    merged = tiny(family).to(torch.bfloat16).float()
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    method.merge(merged, adapter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())
    with torch.no_grad():
        attached = method.attach(tiny(family), base, adapter)(ids).logits
        torch.testing.assert_close(attached, tiny(family)(ids).logits, rtol=1e-4, atol=1e-4)
        method.export(tmp_path, adapter, base=tiny(family), base_name="owner/base")
        exported = PeftModel.from_pretrained(tiny(family), tmp_path)(ids).logits
        torch.testing.assert_close(exported, tiny(family)(ids).logits, rtol=1e-4, atol=1e-4)


def test_corda_takes_the_part_of_most_effect_on_the_inputs_or_of_least(tiny: Any, text: list[Any]) -> None:
    base = model(tiny)
    statistics = measured(model(tiny), text, "inputs")
    shares: dict[str, list[float]] = {}
    for init in ("corda", "corda-kpm"):
        for place, (A, B) in pairs(begun(init, base, statistics)).items():
            W, C = weight(base, place), Statistics(statistics, base, PLACES).mean_outer(place)
            part = 1.5 * B.double() @ A.double()
            shares.setdefault(init, []).append(float((part @ C * part).sum() / (W @ C * W).sum()))
    assert all(high >= 10 * low for high, low in zip(shares["corda"], shares["corda-kpm"], strict=True))
    whole = begun("corda", base, statistics, rank=16, rank_pattern={"down_proj": 32, "up_proj": 32, "q_proj": 32})
    for path in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"):
        A, B = whole[f"0.{path}.A"].double(), whole[f"0.{path}.B"].double()
        W = weight(base, Place(0, path))
        torch.testing.assert_close(6.0 / 32 * B @ A, W, rtol=1e-3, atol=1e-4)  # all directions are all of W


def test_eva_looks_where_the_inputs_vary_most_and_lora_ga_where_the_gradient_does(tiny: Any, text: list[Any]) -> None:
    base = model(tiny)
    inputs, gradients = (measured(model(tiny), text, of) for of in ("inputs", "gradients"))
    for place, (A, B) in pairs(begun("eva", base, inputs)).items():
        C = Statistics(inputs, base, PLACES).mean_outer(place)
        assert not B.any()
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-5)
        assert float((A.double() @ C @ A.T.double()).trace()) == pytest.approx(
            float(torch.linalg.eigvalsh(C)[-4:].sum()), rel=1e-5
        )
    drawn = torch.Generator().manual_seed(0)
    for place, (A, B) in pairs(begun("lora-ga", base, gradients)).items():
        G = gradients[place.key("gradients")].double()
        size = G.shape[0] ** 0.5 / GAMMA
        torch.testing.assert_close(A @ A.T, size * torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(B.T @ B, size * torch.eye(4), rtol=0, atol=1e-5)

        def step(A: Tensor, B: Tensor, G: Tensor = G) -> Tensor:
            """What of the gradient a first step on the factors takes."""
            return G @ A.T.double() @ A.double() + B.double() @ B.T.double() @ G

        others = [torch.linalg.qr(torch.randn(n, 4, generator=drawn)).Q * size**0.5 for n in (G.shape[1], G.shape[0])]
        taken, random = ((step(one, two) * G).sum() for one, two in ((A, B), (others[0].T, others[1])))
        assert float(taken) >= 1.2 * float(random)
        best = torch.linalg.svdvals(G)[:8].square().sum() * size
        assert float(taken) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("init", STARTS)
def test_sums_of_two_sites_give_the_start_of_the_pooled_data(init: str, tiny: Any, text: list[Any]) -> None:
    of = STARTS[init].takes
    half = len(text) // 2 or 1
    updates = [measured(model(tiny), part, of) for part in (text[:half], text[half:])]
    zeros = {key: torch.zeros_like(value) for key, value in updates[0].items()}
    fold = aggregation.make("sum", {}).begin(Version(zeros, {"": zeros}), make("moments", {"of": of}).schema(zeros))
    for site, update in zip(("bank", "clinic"), updates, strict=True):
        fold.add(update, Origin(site, "", 0.5))
    apart = pairs(begun(init, model(tiny), fold.finish([""]).adapter))
    pooled = pairs(begun(init, model(tiny), measured(model(tiny), text, of)))
    for place, (A, B) in pooled.items():
        for own, other in ((A, apart[place].A), (B.T, apart[place].B.T)):
            signs = (own * other).sum(dim=1, keepdim=True).sign()
            assert float((own - signs * other).norm()) <= 1e-3 * max(float(own.norm()), 1e-6), place


def test_damping_is_just_enough_for_an_inverse() -> None:
    C = torch.zeros(6, 6, dtype=torch.float64)
    C[0, 0] = 3.0
    own, inverse = damped(C)
    torch.testing.assert_close(own @ inverse, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(own - C, 0.005 * torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="inputs that are all zero tell nothing"):
        damped(torch.zeros(3, 3, dtype=torch.float64))


def test_what_does_not_go_with_such_a_start_is_refused(tiny: Any, text: list[Any]) -> None:
    base, statistics = model(tiny), measured(model(tiny), text, "inputs")
    with pytest.raises(ValueError, match="the gradients of 0.self_attn.q_proj were not measured"):
        begun("lora-ga", base, statistics)
    with pytest.raises(ValueError, match="rank 17 is more than 0.self_attn.q_proj"):
        make("lora", {"init": "lora-ga", "rank": 17}).fits(base, PLACES)
    with pytest.raises(ValueError, match="init 'corda' has one start, of one rank"):
        make("lora", {"init": "corda", "ranks": {"small": 2}})
    method: Any = make("lora", {"init": "eva", "ranks": {"small": 2}})
    small = method.begin(base, PLACES, statistics, seed=0, tier="r2")
    large = method.begin(base, PLACES, statistics, seed=0)
    assert all(torch.equal(small[key], large[key][:2]) for key in small if key.endswith(".A"))
