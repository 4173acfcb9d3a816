from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.emulator.activations import mean_squares
from offsite.emulator.anatomy.narrow import channels, groups
from offsite.emulator.anatomy.roles import heads, roles
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, shape
from offsite.emulator.builders import Material, make
from offsite.emulator.builders.loram import by_activation, by_weight
from offsite.emulator.formats.packed import dense
from offsite.emulator.modality import Batch
from offsite.emulator.outline import Draft, Outline


def test_units_score_the_product_of_the_norms_of_what_they_own(tiny: Any) -> None:
    model = tiny()
    layer, found = layers(model)[0], roles(model, 0)
    gate, up, down = (
        layer.get_submodule(f"mlp.{name}_proj").weight.detach().double() for name in ("gate", "up", "down")
    )
    expected = torch.stack([gate[c].norm() * up[c].norm() * down[:, c].norm() for c in range(48)])
    torch.testing.assert_close(by_weight(layer, channels(layer, found)), expected)
    q, k, v, o = (layer.get_submodule(f"self_attn.{name}_proj").weight.detach().double() for name in "qkvo")
    expected = torch.stack(
        [
            q[16 * g : 16 * g + 16].norm() * k[8 * g : 8 * g + 8].norm() * v[8 * g : 8 * g + 8].norm()
            * o[:, 16 * g : 16 * g + 16].norm()
            for g in range(2)
        ]
    )  # fmt: skip
    torch.testing.assert_close(by_weight(layer, groups(layer, found, heads(model))), expected)


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
@torch.no_grad()
def test_inputs_are_measured_on_tokens_and_not_on_padding(family: str, tiny: Any, text: list[Batch]) -> None:
    model = tiny(family)
    path = roles(model, 2).mlp_out
    found = mean_squares(model, {(2, path): 2, (3, path): 2}, text)
    squares, tokens = torch.zeros(shape(layers(model)[2].get_submodule(path))[1]), 0
    heard: list[Tensor] = []
    for place in (2, 3):
        layers(model)[place].get_submodule(path).register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    for batch in text:
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            model(row[None, : int(mask.sum())])
            tokens += 2 * int(mask.sum())
    for one in heard:
        squares += one.flatten(0, -2).square().sum(dim=0)
    torch.testing.assert_close(found[2, path].float(), squares / tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_by_activation_the_channels_that_text_moves_stay(family: str, tiny: Any, text: list[Batch]) -> None:
    base = tiny(family, 3)
    path = roles(base, 1).mlp_out
    rms = mean_squares(base, {(1, path): 1}, text)[1, path].sqrt()
    score = dense(layers(base)[1].get_submodule(path)).norm(dim=0) * rms
    pruned = score.argsort()[: len(score) // 4]
    builder = make("loram", {"mlp": 0.25, "first": 1, "last": 1, "score": "activation"})
    draft = builder.change(Draft(base, restack(base, range(3)), Outline((0, 1, 2), (0,))), Material(batches=text))
    kept = draft.recovery[f"1.{path}.columns"].tolist()
    assert {*kept} == {*range(len(score))} - {*pruned.tolist()}
    weighed = by_weight(layers(base)[1], channels(layers(base)[1], roles(base, 1)))
    assert {*weighed.argsort()[: len(score) // 4].tolist()} != {*pruned.tolist()}


def test_activation_weighs_each_column_by_its_input(tiny: Any) -> None:
    model = tiny()
    layer = layers(model)[0]
    units = groups(layer, roles(model, 0), heads(model))
    rms = torch.rand(32, generator=torch.Generator().manual_seed(0)).double()
    weighed = layer.self_attn.o_proj.weight.detach().double() * rms
    expected = torch.stack([weighed[:, :16].norm(), weighed[:, 16:].norm()])
    torch.testing.assert_close(by_activation(layer, units, rms), expected)
