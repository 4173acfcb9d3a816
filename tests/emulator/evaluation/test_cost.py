from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, linears
from offsite.emulator.evaluation.cost import Cost, costs, peak_bytes
from offsite.emulator.formats.blockwise import Blockwise
from offsite.emulator.formats.int4 import Int4
from offsite.emulator.formats.packed import packed
from offsite.emulator.methods import make
from offsite.emulator.modality.causal_text.batch import TokenBatch

B, T, V, D = 2, 5, 24, 16


class Stack(nn.Module):
    """An embedding, square maps without a bias, and a head, called as a language model is."""

    def __init__(self, maps: int, width: int = D) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, width)
        self.maps = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(maps)))
        self.head = nn.Linear(width, V, bias=False)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.maps(self.embedding(input_ids)))[:, :-1])


@pytest.fixture
def batch() -> TokenBatch:
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    return TokenBatch(ids, torch.ones_like(ids), ids)


def cost(model: nn.Module, batch: TokenBatch, *trained: nn.Parameter) -> Cost:
    parameters = {str(number): parameter for number, parameter in enumerate(trained)}
    return costs({"it": (model, parameters)}, batch, repeats=1)["it"]


def test_flops_are_those_of_the_formula(batch: TokenBatch) -> None:
    model = Stack(3)
    product, head = 2 * B * T * D * D, 2 * B * T * D * V
    forward = 3 * product + head
    # Backward: a gradient of the input where something below trains, and one of each weight that trains.
    assert cost(model, batch, model.head.weight).flops == forward + head
    assert cost(model, batch, model.maps[2].weight).flops == forward + head + product
    assert cost(model, batch, model.maps[0].weight).flops == forward + head + 2 * product + product
    everything = cost(model, batch, *model.parameters()).flops
    assert everything == forward + 2 * (3 * product + head)


@pytest.mark.parametrize("name", ["llama", "opt"])  # with grouped and with plain heads
def test_attention_counts_as_if_it_were_written_out(name: str, tiny: Any, ids: Tensor) -> None:
    batch, flops = TokenBatch(ids, torch.ones_like(ids), ids), {}
    for kind in ("eager", "sdpa"):
        model = tiny(name, 2)
        model.set_attn_implementation(kind)
        flops[kind] = cost(model, batch, *layers(model)[0].parameters()).flops
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    again = 2 * ids.numel() * ids.shape[1] * config.num_attention_heads * width  # Q K', not kept for backward
    assert flops["sdpa"] - flops["eager"] == 2 * again


def test_the_peak_counts_what_is_alive_at_a_time() -> None:
    held = torch.zeros(100)

    def action() -> None:
        first = held + 1
        second = first + 1
        del first
        third = second.view(10, 10) * 2  # a view takes no memory
        del second, third

    assert peak_bytes(action, [held, held[:50]]) == 3 * 400
    assert peak_bytes(lambda: None, [held, torch.zeros(3, dtype=torch.float64)]) == 424


def test_the_peak_counts_what_is_kept_for_backward_and_gradients() -> None:
    weight = torch.zeros(100, requires_grad=True)

    def action() -> None:
        kept = weight.exp()  # its output is kept
        total = kept.sum()  # nothing is
        del kept
        total.backward()

    # At the end of backward: weight, output of exp, total, the gradients of total and of weight.
    assert peak_bytes(action, [weight]) == 3 * 400 + 2 * 4


@pytest.mark.parametrize("width", [16, 512])
def test_the_peak_of_a_step_is_that_of_weights_gradients_and_moments(batch: TokenBatch, width: int) -> None:
    model = Stack(1, width)
    frozen, trained = V * width + width * width, V * width
    # When AdamW steps: the weight, its gradient, two moments, the second one's root and that root corrected.
    floats = frozen + 6 * trained + 1  # and the number of the step
    tokens = 2 * 8 * B * T  # ids that are labels as well, and the mask
    assert cost(model, batch, model.head.weight).peak_bytes == 4 * floats + tokens


@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_a_second_measurement_has_the_same_flops_and_bytes(name: str, tiny: Any, text: list[TokenBatch]) -> None:
    model, method = tiny(name, 3), make("lora", {"rank": 2})
    attached = method.attach(model, {0: 0}, method.start(model, {0: 0}, seed=0))
    candidate = {"it": (attached, method.named_parameters(attached, {0: 0}))}
    first, second = (costs(candidate, text[0], repeats=1)["it"] for _ in range(2))
    assert (first.flops, first.peak_bytes) == (second.flops, second.peak_bytes)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_emulator_costs_less_than_lora_on_the_base(name: str, tiny: Any, text: list[TokenBatch]) -> None:
    base, method = tiny(name), make("lora", {"rank": 2})
    emulator = restack(base, [0, 5])
    candidates = {}
    for what, model, places in (("emulator", emulator, {0: 0, 1: 5}), ("base", base, {p: p for p in range(6)})):
        attached = method.attach(model, places, method.start(model, places, seed=0))
        candidates[what] = (attached, method.named_parameters(attached, places))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    found = costs(candidates, text[0], repeats=2)
    assert list(found) == ["emulator", "base"]
    assert found["emulator"].flops < found["base"].flops
    assert found["emulator"].peak_bytes < found["base"].peak_bytes
    assert all(0 < one.cpu_s < float("inf") for one in found.values())
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_candidates_that_share_tensors_are_measured_as_if_alone(tiny: Any, text: list[TokenBatch]) -> None:
    base = tiny()
    candidates = {
        str(place): (restack(base, range(6)), dict(layers(base)[place].named_parameters())) for place in (0, 5)
    }
    together = costs(candidates, text[0], repeats=1)
    for name, candidate in candidates.items():
        alone = costs({name: candidate}, text[0], repeats=1)[name]
        assert (alone.flops, alone.peak_bytes) == (together[name].flops, together[name].peak_bytes)
    assert together["0"].flops > together["5"].flops


def test_packed_maps_keep_no_dense_copy_for_backward(batch: TokenBatch) -> None:
    maps, width, format = 6, 64, Int4()
    plain, small = Stack(maps, width), Stack(maps, width)
    for model in (plain, small):
        model.maps.insert(0, nn.LayerNorm(width))  # what trains, below all maps
    for number in range(1, maps + 1):
        linear = small.maps[number]
        parts = format.encode(linear.get_parameter("weight").detach())
        small.maps[number] = packed(linear, format, parts)
    stored = sum(part.nbytes for part in parts.values())
    matrix = 4 * width * width
    found = {
        name: cost(model, batch, *model.maps[0].parameters()) for name, model in (("plain", plain), ("small", small))
    }
    saved = found["plain"].peak_bytes - found["small"].peak_bytes
    unpacking = decoding(format, parts, width) - stored  # of one map at a time
    activation = 4 * B * T * width  # the peaks are at moments that differ by one
    assert saved == pytest.approx(maps * (matrix - stored) - unpacking, abs=activation)
    assert found["small"].flops == found["plain"].flops


def decoding(format: Blockwise, parts: dict[str, Tensor], width: int) -> int:
    return peak_bytes(lambda: format.decode(parts, width, width), parts.values())


def test_a_candidate_without_parameters_or_no_repeat_is_an_error(batch: TokenBatch) -> None:
    model = Stack(1)
    with pytest.raises(ValueError, match="parameters that train"):
        costs({"it": (model, {})}, batch)
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        costs({"it": (model, {"head": model.head.weight})}, batch, repeats=0)


def test_linear_maps_of_the_layers_make_most_of_a_models_flops(tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny("llama", 4)
    tokens, entries = text[0].input_ids.numel(), 0
    for layer in layers(model):
        entries += sum(layer.get_submodule(path).weight.numel() for path in linears(layer))
    found = cost(model, text[0], *layers(model)[0].parameters())
    assert 2 * 2 * tokens * entries < found.flops < 3 * 2 * tokens * entries
