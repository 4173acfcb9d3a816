"""Masks: plain zeros and every other weight bit for bit, a bit for a weight on the wire, and a round that goes on."""

from typing import Any

import pytest
import torch

from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.vote import Vote
from offsite.emulator.anatomy.narrow import channels, narrow
from offsite.emulator.anatomy.roles import roles
from offsite.emulator.anatomy.structure import is_transposed, layers, linears
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.amt import OFF, ON, THRESHOLD
from offsite.emulator.plug import plug
from offsite.kernels.bits import unpack
from offsite.kernels.schema import settle, size_bytes

PLACES = {0: 0, 4: 4}
ATTENTION = {"llama": "self_attn", "gpt2": "attn"}


def learned(model: Any, *, seed: int = 1, **settings: Any) -> Adapter:
    """An adapter of which about a third of the bits are zero."""
    method, draw = make("amt", settings), torch.Generator().manual_seed(seed)
    attached = method.attach(model, PLACES, method.start(model, PLACES, seed=0))
    with torch.no_grad():
        for score in method.named_parameters(attached, PLACES).values():
            score.sub_(0.015 * torch.rand(score.shape, generator=draw))
    return method.state(attached, PLACES)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masked_weights_are_zero_and_all_others_stay_bit_for_bit(family: str, tiny: Any, ids: torch.Tensor) -> None:
    method, base, merged = make("amt", {}), tiny(family).bfloat16(), tiny(family).bfloat16()
    adapter = learned(tiny(family))
    assert all(ATTENTION[family] in key for key in adapter)
    method.merge(merged, adapter)
    masked = 0
    for at, (layer, other) in enumerate(zip(layers(base), layers(merged), strict=True)):
        for path in linears(layer):
            W, merged_W = (one.get_submodule(path).weight for one in (layer, other))
            if f"{at}.{path}.mask" in adapter:
                keep = unpack(adapter[f"{at}.{path}.mask"], W.numel()).bool()
                keep = keep.view(W.T.shape if is_transposed(layer.get_submodule(path)) else W.shape)
                keep = keep.T if is_transposed(layer.get_submodule(path)) else keep
                assert torch.equal(merged_W, torch.where(keep, W, torch.zeros_like(W)))
                assert not (merged_W[~keep].signbit()).any(), "plain zeros"
                masked += int((~keep).sum())
            else:
                assert torch.equal(merged_W, W)
    assert masked > 100
    with torch.no_grad():
        torch.testing.assert_close(plug(tiny(family), method, adapter)(ids).logits, merged_logits(family, tiny, ids))


def merged_logits(family: str, tiny: Any, ids: torch.Tensor) -> torch.Tensor:
    model = tiny(family)
    make("amt", {}).merge(model, learned(tiny(family)))
    return torch.Tensor(model(ids).logits)


def test_an_update_is_a_bit_for_a_weight_and_the_sizes_of_the_maps(tiny: Any) -> None:
    method, model = make("amt", {"modules": "all-linear"}), tiny()
    start = method.start(model, PLACES, seed=0)
    stack = [layers(model)[at] for at in PLACES]
    weights = [layer.get_submodule(path).weight.numel() for layer in stack for path in linears(layer)]
    schema = settle(method.schema(start), {key: tensor.shape for key, tensor in start.items()})
    assert size_bytes(schema) == sum(-(-count // 8) + 8 for count in weights)
    assert sum(field.trained for field in schema.values()) == sum(weights)


def test_a_score_has_the_gradient_of_the_weight_times_the_weight(tiny: Any, ids: torch.Tensor) -> None:
    method, base = make("amt", {"modules": ("q_proj",)}), tiny()
    W = layers(base)[4].get_submodule("self_attn.q_proj").weight
    base(ids).logits.square().sum().backward()
    model = method.attach(tiny(), PLACES, method.start(tiny(), PLACES, seed=0))
    model(ids).logits.square().sum().backward()
    score = method.named_parameters(model, PLACES)["4.self_attn.q_proj.mask"]
    torch.testing.assert_close(score.grad, W.grad * W)


def test_scores_of_the_next_round_are_as_far_from_the_threshold_on_either_side(tiny: Any) -> None:
    method, adapter = make("amt", {}), learned(tiny())
    model = method.attach(tiny(), PLACES, adapter)
    for key, score in method.named_parameters(model, PLACES).items():
        keep = unpack(adapter[key], score.numel()).view(score.shape)
        assert torch.equal(score.detach(), torch.where(keep > 0, ON, OFF))
    assert ON - THRESHOLD == THRESHOLD - OFF > 0
    assert all(torch.equal(tensor, adapter[key]) for key, tensor in method.state(model, PLACES).items())


def test_three_sites_vote_and_the_majority_goes_into_the_base(tiny: Any) -> None:
    method, start = make("amt", {}), make("amt", {}).start(tiny(), PLACES, seed=0)
    updates = [learned(tiny(), seed=seed) for seed in (1, 2, 3)]
    fold = Vote().begin(Version(start, {"": start}), method.schema(start))
    for number, one in enumerate(updates):
        fold.add(one, Origin(f"site-{number}", "", 1 / 3))
    version = fold.finish([""])
    for key in (key for key in start if key.endswith(".mask")):
        bits = torch.stack([unpack(one[key], 8 * len(one[key])) for one in updates])
        assert torch.equal(unpack(version.adapter[key], 8 * len(start[key])), (bits.sum(0) >= 2).to(torch.uint8))
    method.merge(tiny(), version.adapter)
    assert 0 < version.figures["zeros"] < 1 and 1 / 3 < version.figures["agreement"] < 1


@torch.no_grad()
def test_weights_that_a_narrowed_map_lacks_stay(tiny: Any) -> None:
    method, base, small = make("amt", {"modules": "all-linear"}), tiny(), tiny()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    recovery: dict[str, torch.Tensor] = {}
    for place in PLACES:
        kept = narrow(layers(small)[place], channels(layers(small)[place], roles(small, place)), torch.arange(1, 48, 2))
        recovery |= {f"{place}.{name}": index for name, index in kept.items()}
    adapter = learned(small, modules="all-linear")
    method.merge(base, method.recover(adapter, recovery))
    for name, tensor in base.state_dict().items():
        key = name.removeprefix("model.layers.").removesuffix(".weight")
        if f"{key}.mask" in adapter:
            zeros = int((unpack(adapter[f"{key}.mask"], int(adapter[f"{key}.size"].prod())) == 0).sum())
            assert int((tensor == 0).sum()) == zeros and torch.equal(tensor[tensor != 0], before[name][tensor != 0])
    with pytest.raises(ValueError, match=r"0.mlp.gate_proj: a mask of \(48, 32\) does not fit a map that was narrowed"):
        method.recover(method.start(tiny(), PLACES, seed=0), recovery)


def test_a_mask_of_another_map_or_of_too_few_bytes_is_refused(tiny: Any) -> None:
    method, start = make("amt", {}), make("amt", {}).start(tiny(), PLACES, seed=0)
    turned = start | {"0.self_attn.k_proj.size": start["0.self_attn.k_proj.size"].flip(0)}
    with pytest.raises(ValueError, match=r"'0.self_attn.k_proj.size': \(32, 16\) is not that of the map"):
        method.merge(tiny(), turned)
    short = start | {"0.self_attn.k_proj.mask": torch.ones(3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="512 values of 1 bits take 64 bytes, there are 3"):
        method.attach(tiny(), PLACES, short)
