"""What is measured of a map is what torch says of it, only where text is, and nothing of the model changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import is_transposed, layers, linears
from offsite.emulator.methods import make
from offsite.emulator.methods.base import Measuring, Place
from offsite.emulator.methods.sums import Statistics, packed, sources, unpacked
from offsite.emulator.modality.causal_text.batch import TokenBatch

PLACES = {1: 1}


def measured(base: Any, batches: list[Any], **settings: Any) -> dict[str, Tensor]:
    method = make("moments", settings)
    assert isinstance(method, Measuring)
    model = method.attach(base, PLACES, method.start(base, PLACES, seed=0))
    losses = [method.measure(model, PLACES, batch) for batch in batches]
    assert all(loss > 0 for loss in losses)
    return dict(method.state(model, PLACES))


def heard(base: Any, batch: Any) -> dict[str, Tensor]:
    """The inputs of a layer's maps, (b, t, d_in), as a hook of torch's hears them."""
    inputs: dict[str, Tensor] = {}
    for path in linears(layers(base)[1]):
        layers(base)[1].get_submodule(path).register_forward_pre_hook(
            lambda _, arguments, path=path: inputs.__setitem__(path, arguments[0].detach())
        )
    with torch.no_grad():
        modality.run(base, batch)
    return inputs


def test_inputs_are_summed_over_what_is_no_padding_and_kept_once_for_maps_that_share_them(
    family: str, tiny: Any, text: list[Any]
) -> None:
    sums = measured(tiny(family, layers=2), text, of="inputs")
    wanted: dict[str, Tensor] = {}
    total = 0
    for batch in text:
        real = batch.mask.flatten().bool()
        inputs = heard(tiny(family, layers=2), batch)
        total += int(real.sum())
        for path, x in inputs.items():
            rows = x.flatten(0, -2)[real].double()
            wanted[path] = wanted.get(path, torch.zeros(1)) + rows.T @ rows
    model = tiny(family, layers=2)
    first = sources(model, 1, linears(layers(model)[1]))
    assert {key.rpartition(".")[0] for key in sums} == {f"1.{path}" for path in first.values()}
    for path, outer in wanted.items():
        mean = Statistics(sums, model, PLACES).mean_outer(Place(1, path))
        torch.testing.assert_close(mean, outer / total, rtol=1e-4, atol=1e-5 * float((outer / total).abs().max()))
    assert {float(value) for key, value in sums.items() if key.endswith("count")} == {float(total)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_weights_and_squares_those_of_each_batch(
    family: str, tiny: Any, text: list[Any]
) -> None:
    gradients, squares = (measured(tiny(family, layers=2), text, of=of) for of in ("gradients", "squares"))
    base = tiny(family, layers=2)
    for name in {key.rpartition(".")[0] for key in gradients}:
        module = layers(base)[1].get_submodule(name.partition(".")[2])
        each = []
        for batch in text:
            base.zero_grad()
            modality.loss(base, batch).backward()
            own: Any = module.get_parameter("weight").grad
            each.append((own.T if is_transposed(module) else own).clone())
        of_sum = sum(one * batch.targets for one, batch in zip(each, text, strict=True))
        of_square = sum(one.square() for one in each)
        torch.testing.assert_close(gradients[f"{name}.gradients"], of_sum, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(squares[f"{name}.squares"], of_square, rtol=1e-4, atol=1e-7)


def test_it_matters_not_how_rows_are_batched_nor_how_far_they_are_padded(tiny: Any, text: list[Any]) -> None:
    samples = [sample for batch in text for sample in batch.samples]
    for of in ("inputs", "gradients"):
        apart = measured(tiny(layers=2), [modality.collate([sample]) for sample in samples], of=of)
        together = measured(tiny(layers=2), [modality.collate(samples)], of=of)
        for key, value in together.items():
            torch.testing.assert_close(apart[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_measuring_changes_neither_weights_nor_outputs(tiny: Any, text: list[Any], ids: Tensor) -> None:
    method = make("moments", {"of": "squares"})
    model = method.attach(tiny(layers=2), PLACES, method.start(tiny(layers=2), PLACES, seed=0)).train()
    assert isinstance(method, Measuring)
    method.measure(model, PLACES, text[0])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, tiny(layers=2)(ids).logits)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_triangle_is_its_symmetric_matrix_and_nothing_else_is_one() -> None:
    matrix = torch.randn(7, 7)
    matrix = matrix + matrix.T
    assert torch.equal(unpacked(packed(matrix)), matrix)
    with pytest.raises(ValueError, match="11 values are no triangle of a square matrix"):
        unpacked(torch.zeros(11))


def test_what_was_not_measured_is_named(tiny: Any, text: list[Any]) -> None:
    base = tiny(layers=2)
    some = Statistics(measured(tiny(layers=2), text, modules=["down_proj"]), base, PLACES)
    with pytest.raises(ValueError, match=r"the inputs of 1.self_attn.q_proj were not measured; begin from a run"):
        some.mean_outer(Place(1, "self_attn.q_proj"))
    with pytest.raises(ValueError, match="the squares of 1.mlp.down_proj were not measured"):
        some.of_weight(Place(1, "mlp.down_proj"), "squares", (32, 48))
    zeros = make("moments", {}).start(base, PLACES, seed=0)
    with pytest.raises(ValueError, match="no position was measured of the inputs of 1.mlp.up_proj"):
        Statistics(zeros, base, PLACES).mean_outer(Place(1, "mlp.up_proj"))


def test_a_map_that_is_given_some_positions_only_is_refused(tiny: Any, text: list[Any]) -> None:
    method, base = make("moments", {}), tiny(layers=2)
    model = method.attach(base, PLACES, method.start(base, PLACES, seed=0))
    batch = text[0]
    shorter = TokenBatch(batch.input_ids, batch.attention_mask, batch.labels)
    one = layers(model)[1].get_submodule("mlp.down_proj")
    one.register_forward_pre_hook(lambda _, arguments: (arguments[0][:, :2],))
    assert isinstance(method, Measuring)
    with pytest.raises(ValueError, match=r"1.mlp.down_proj is given \d+ of a batch's \d+ positions.*leave it out"):
        method.measure(model, PLACES, shorter)
