"""Adapters of a language: sequential ones behind MLPs, and a coupling that moves tokens and moves them back."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offsite.emulator.anatomy.structure import find, layers
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import Formula
from offsite.emulator.methods.invertible import Coupling
from offsite.emulator.plug import load

PLACES = {0: 0, 5: 5}
METHOD: Any = make("invertible", {"bottleneck": 3})


def moved(model: Any, *, seed: int = 1, places: dict[int, int] = PLACES) -> Adapter:
    """An adapter that has learned something."""
    drawn = torch.Generator().manual_seed(seed)
    start = METHOD.start(model, places, seed=0)
    return {key: tensor + 0.2 * torch.randn(tensor.shape, generator=drawn) for key, tensor in start.items()}


def coupling(adapter: Adapter) -> Coupling:
    prefix = "0.coupling."
    return Coupling({key.removeprefix(prefix): tensor for key, tensor in adapter.items() if key.startswith(prefix)})


@torch.no_grad()
def test_the_inverse_is_exact_also_of_an_average_and_the_start_is_the_identity(tiny: Any) -> None:
    one, other = moved(tiny(), seed=1), moved(tiny(), seed=2)
    mean = {key: (tensor + other[key]) / 2 for key, tensor in one.items()}
    x = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0))
    for adapter in (one, other, mean):
        net = coupling(adapter)
        assert not torch.allclose(net(x), x, atol=0.1)
        assert float((net(net(x), inverse=True) - x).abs().max()) < 1e-5
        assert float((net(net(x, inverse=True)) - x).abs().max()) < 1e-5
    assert torch.equal(coupling(METHOD.start(tiny(), PLACES, seed=0))(x), x)


@torch.no_grad()
def test_a_coupling_is_that_of_the_paper(tiny: Any) -> None:
    adapter = moved(tiny())
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    def net(name: str, half: Tensor) -> Tensor:
        D, d, U, u = (adapter[f"0.coupling.{name}_{part}"] for part in ("down", "down_bias", "up", "up_bias"))
        return functional.relu(half @ D.T + d) @ U.T + u

    first = x[:, :16] + net("F", x[:, 16:])
    expected = torch.cat([first, x[:, 16:] + net("G", first)], dim=1)
    torch.testing.assert_close(coupling(adapter)(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("trained", [(0, 5), (2,)])
def test_it_is_at_the_input_of_the_first_layer_that_trains_and_its_inverse_at_the_output_of_the_last(
    family: str, trained: tuple[int, ...], tiny: Any
) -> None:
    model, places = tiny(family), dict(zip(trained, trained, strict=True))
    adapter = moved(model, places=places)
    still = {key: tensor if ".coupling." in key else torch.zeros_like(tensor) for key, tensor in adapter.items()}
    METHOD.attach(model, places, still)
    stack = layers(model)
    assert [any("coupling" in name for name, _ in layer.named_modules()) for layer in stack] == [
        at == trained[0] for at in range(6)
    ]
    seen: list[Tensor] = []
    stack[trained[0]].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    path = f"{find(model).path}.{trained[-1]}"
    plain = tiny(family).get_submodule(path)
    given = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    net = coupling({key.replace(f"{trained[0]}.", "0.", 1): tensor for key, tensor in adapter.items()})
    own = {"position_embeddings": (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))} if family == "llama" else {}

    def output(layer: Any, hidden: Tensor) -> Tensor:
        result = layer(hidden, **own)
        return result[0] if isinstance(result, tuple) else result

    output(stack[trained[0]], given)
    torch.testing.assert_close(seen[0], net(given))
    inward = net(given) if len(trained) == 1 else given
    torch.testing.assert_close(output(stack[trained[-1]], given), net(output(plain, inward), inverse=True))


def test_there_are_as_many_values_as_the_paper_has(tiny: Any) -> None:
    def count(formula: str, settings: dict[str, int]) -> int:
        return int(eval(formula, {}, settings))

    formula: Formula = METHOD.formula
    sizes = {"d": 768, "bottleneck": 48, "reduction": 2}
    assert 12 * count(formula.values, sizes) == 894_528
    assert count(formula.once, sizes) == 296_064


@torch.no_grad()
def test_a_language_is_put_beside_the_base_as_it_was_exported(tiny: Any, ids: Tensor, tmp_path: Any) -> None:
    adapter, plain = moved(tiny()), tiny()(ids).logits
    expected = METHOD.attach(tiny(), PLACES, adapter)(ids).logits
    METHOD.export(tmp_path, adapter, base=tiny(), base_name="base")
    assert torch.equal(load(tiny(), tmp_path)(ids).logits, expected)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    adapter = moved(tiny())
    with pytest.raises(ValueError, match=r"takes 0.coupling.F_down \(h, 16\), .* adapter has none of them"):
        METHOD.attach(tiny(), PLACES, {key: tensor for key, tensor in adapter.items() if ".coupling." not in key})
    with pytest.raises(ValueError, match=r"takes 0.coupling.F_down \(h, 16\)"):
        METHOD.attach(tiny(), PLACES, adapter | {"0.coupling.G_up": torch.zeros(16, 7)})
    with pytest.raises(ValueError, match="bottleneck and reduction must be at least 1, got 48 and 0"):
        make("invertible", {"reduction": 0})
    model = tiny(layers=2)
    layers(model)[0].mlp.down_proj.out_features = 31
    with pytest.raises(ValueError, match="a width of 31, which has no two halves"):
        METHOD.fits(model, {0: 0})


@torch.no_grad()
def test_a_sequential_adapter_has_biases_and_is_behind_the_mlp_alone(tiny: Any) -> None:
    settings = {"width": 3, "activation": "relu", "biases": True, "modules": "mlp-output"}
    method = make("bottleneck", settings)
    start, drawn = method.start(tiny(), PLACES, seed=0), torch.Generator().manual_seed(0)
    assert {key.rpartition(".")[0] for key in start} == {"0.mlp.down_proj", "5.mlp.down_proj"}
    adapter = {key: tensor + 0.1 * torch.randn(tensor.shape, generator=drawn) for key, tensor in start.items()}
    x = torch.randn(2, 5, 48, generator=drawn)
    y = layers(tiny())[5].get_submodule("mlp.down_proj")(x)
    D, d, U, u = (adapter[f"5.mlp.down_proj.{part}"] for part in ("down", "down_bias", "up", "up_bias"))
    attached = layers(method.attach(tiny(), PLACES, adapter))[5].get_submodule("mlp.down_proj")
    torch.testing.assert_close(attached(x), y + functional.relu(y @ D.T + d) @ U.T + u)
