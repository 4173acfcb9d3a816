"""Fisher information: squares of each sequence's gradients at an adapter, the same however sequences are held."""

from typing import Any

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.emulator import modality
from offsite.emulator.methods import make
from offsite.emulator.methods.base import Carrying, Measuring
from offsite.emulator.modality import collate, encode
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.retention.base import moving
from offsite.kernels.schema import Rule

PLACES = {0: 0, 1: 1}
LORA = {"method": "lora", "settings": {"rank": 2, "modules": ["q_proj"]}}


@pytest.fixture
def samples(tokenizer: Any) -> list[Any]:
    texts = [" ".join(f"w{3 + (7 * row + at) % 80}" for at in range(6 + row)) for row in range(6)]
    return encode([TextExample("", text) for text in texts], tokenizer, max_length=16)


def adapter(method: Any, model: Any) -> dict[str, torch.Tensor]:
    """An adapter of the method that it is of, with no value at zero."""
    start = method.of.start(model, PLACES, seed=0)
    random = torch.Generator().manual_seed(1)
    return {key: tensor + 0.1 * torch.randn(tensor.shape, generator=random) for key, tensor in start.items()}


def measured(tiny: Any, samples: list[Any], *, batch: int = 6) -> Any:
    method: Any = make("fisher", LORA)
    model = tiny("llama", layers=2)
    begun = method.begin(model, PLACES, adapter(method, model), seed=0)
    model = method.attach(model, PLACES, begun)
    for at in range(0, len(samples), batch):
        method.measure(model, PLACES, collate(samples[at : at + batch]))
    return method, method.state(model, PLACES)


def test_it_is_the_squared_gradients_of_each_sequences_log_likelihood(tiny: Any, samples: list[Any]) -> None:
    method, state = measured(tiny, samples)
    assert isinstance(method, Measuring) and isinstance(method, Carrying)
    model = tiny("llama", layers=2)
    start = adapter(method, model)
    model = method.of.attach(model, PLACES, start)
    live, wanted, targets = method.of.named_parameters(model, PLACES), dict[str, torch.Tensor](), 0
    for one in samples:
        batch = collate([one])
        gradients = torch.autograd.grad(-modality.likelihoods(model, batch).sum(), list(live.values()))
        wanted = {key: wanted.get(key, 0) + gradient.square() for key, gradient in zip(live, gradients, strict=True)}
        targets += batch.targets
    back, fisher = method.apart(state, {})
    assert back.keys() == start.keys() and all(torch.equal(back[key], start[key]) for key in start)
    assert fisher.keys() == live.keys() and float(state["0.fisher.count"]) == targets
    for key, value in fisher.items():
        assert bool(value.any()) and bool((value >= 0).all())
        torch.testing.assert_close(value, wanted[key] / targets, rtol=1e-3, atol=1e-6 * float(value.max()))


def test_batches_do_not_matter_and_what_two_sites_measure_adds_up_to_what_one_does(
    tiny: Any, samples: list[Any]
) -> None:
    method, pooled = measured(tiny, samples)
    sites = [measured(tiny, some, batch=2)[1] for some in (samples[:2], samples[2:])]
    begun = method.begin(tiny("llama", layers=2), PLACES, adapter(method, tiny("llama", layers=2)), seed=0)
    schema = method.schema(begun)
    fold = aggregation.make("sum", {}).begin(Version(begun, {"r2": begun}), schema)
    for site, update in zip(("bank", "clinic"), sites, strict=True):
        fold.add(update, Origin(site, "r2", 0.5))
    version = fold.finish(["r2"])
    for key, field in schema.items():
        if field.rule is Rule.FIXED:
            assert torch.equal(version.adapter[key], begun[key]) and torch.equal(
                version.broadcast["r2"][key], begun[key]
            )
        else:
            assert not bool(version.broadcast["r2"][key].any())
            atol = 1e-5 * float(pooled[key].max())
            torch.testing.assert_close(version.adapter[key], pooled[key], rtol=1e-4, atol=atol)


def test_earlier_tasks_count_as_much_as_the_decay_says(tiny: Any, samples: list[Any]) -> None:
    method, state = measured(tiny, samples)
    _, own = method.apart(state, {})
    earlier = {key: torch.ones_like(value) for key, value in own.items()}
    _, both = make("fisher", LORA | {"decay": 0.25}).apart(state, earlier)  # type: ignore[attr-defined]
    for key, value in own.items():
        torch.testing.assert_close(both[key], value + 0.25)
    empty = {key: torch.zeros_like(one) if "fisher" in key else one for key, one in state.items()}
    with pytest.raises(ValueError, match="no target was measured"):
        method.apart(empty, {})


def test_nothing_trains_and_a_version_of_another_shape_is_refused(tiny: Any) -> None:
    method: Any = make("fisher", LORA)
    model = tiny("llama", layers=2)
    other = make("lora", {"rank": 3, "modules": ["q_proj"]}).start(model, PLACES, seed=0)
    with pytest.raises(ValueError, match=r"the version has 0.*\(3, \d+\), and sites train it as \(2, \d+\)"):
        method.begin(model, PLACES, other, seed=0)
    model = method.attach(model, PLACES, method.start(model, PLACES, seed=0))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not method.named_parameters(model, PLACES) and moving(method.of.schema(other))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decay": 1.5}, "decay must be"),
        ({"method": "amt"}, "has no values whose gradients are squared"),
        ({"method": "moments"}, "has no values whose gradients are squared"),
        ({"method": "nothing"}, "there is no method 'nothing'"),
        ({"settings": {"ranks": {"bank": 2}}}, "sites of one tier measure; leave out ranks"),
        ({"settings": {"rang": 2}}, "no setting 'rang'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make("fisher", settings)
