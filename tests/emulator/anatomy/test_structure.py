from typing import Any

import pytest
from torch import nn

from offsite.emulator.anatomy.structure import find, is_transposed, layers, linears, shape


def test_the_layers_of_every_family_are_found(family: str, tiny: Any) -> None:
    model = tiny(family, 5)
    stack = layers(model)
    assert len(stack) == 5
    assert find(model).path and model.get_submodule(find(model).path) is stack


def test_linear_maps_are_found_with_their_shapes(family: str, tiny: Any) -> None:
    layer = layers(tiny(family))[0]
    matrices = {name.removesuffix(".weight") for name, weight in layer.named_parameters() if weight.ndim == 2}
    assert set(linears(layer)) == matrices
    for path in matrices:
        module = layer.get_submodule(path)
        stored = tuple(module.get_parameter("weight").shape)
        assert stored == (shape(module)[::-1] if is_transposed(module) else shape(module))


def test_only_gpt2_stores_its_maps_transposed(family: str, tiny: Any) -> None:
    layer = layers(tiny(family))[0]
    assert {is_transposed(layer.get_submodule(path)) for path in linears(layer)} == {family == "gpt2"}


def test_a_list_inside_a_layer_is_not_taken_for_the_stack(tiny: Any) -> None:
    model = tiny("llama", 3)
    layers(model)[1].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert find(model).path == "model.layers"


def test_an_unknown_structure_is_refused_with_what_was_looked_for(tiny: Any) -> None:
    model = tiny("llama", 3)
    model.config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=r"one list of 4 blocks of equal class .* and found 0"):
        find(model)
    model.config.num_hidden_layers = 3
    model.second = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(ValueError, match=r"found 2: model.layers, second"):
        find(model)
    del model.second
    layers(model)[1] = nn.Identity()
    with pytest.raises(ValueError, match="found 0"):
        find(model)
