from typing import Any

import pytest
import torch

from offsite.emulator import modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import longest
from offsite.emulator.builders import BUILDERS, make
from offsite.emulator.builders.base import even
from offsite.emulator.builders.crash import nearest, pooled
from offsite.emulator.builders.reductions import MARGIN, cluster
from offsite.emulator.modality import Batch
from offsite.emulator.outline import Outline
from offsite.emulator.placements import Ends, Kept, Spread
from offsite.kernels.cka import adjacent_cka


def outline(name: str, model: Any, text: Any = (), *, placement: Any = None, **settings: Any) -> Outline:
    builder: Any = make(name, settings)
    found: Outline = builder.outline(model, text, placement or Ends())
    return found


def test_the_layers_that_train_are_spread_as_in_the_papers_lists() -> None:
    for kept, count, expected in ((12, 4, (0, 4, 8, 11)), (22, 4, (0, 7, 14, 21)), (5, 1, (0,))):
        assert Spread(count).choose(range(kept), 30) == expected


def test_a_missing_layer_takes_the_nearest_and_of_two_the_right_one() -> None:
    assert nearest(8, [0, 2, 6]) == {1: 2, 3: 2, 4: 6, 5: 6, 7: 6}


def test_even_distances_are_those_of_offsite_tuning() -> None:
    assert [2 + at for at in even(20, 8)] == [2, 5, 7, 10, 13, 16, 18, 21]  # 2-8-2 of 24 layers, as published
    assert even(4, 3) == [0, 2, 3]  # 1.5 goes to the even 2
    assert even(6, 4) == [0, 2, 3, 5]
    assert even(7, 1) == [3]
    assert even(5, 5) == [0, 1, 2, 3, 4]


def test_uniform_keeps_the_ends_and_counts_all_layers(tiny: Any) -> None:
    assert outline("uniform", tiny("llama", 10), keep=6) == Outline((0, 1, 2, 7, 8, 9), (0, 1, 8, 9))
    assert outline("uniform", tiny(), placement=Ends(1, 2), keep=4).layers == (0, 2, 4, 5)
    assert outline("uniform", tiny(), placement=Kept(), keep=3) == Outline((0, 2, 5), (0, 2, 5))
    assert outline("uniform", tiny(), placement=Spread(2), keep=3) == Outline((0, 2, 5), (0, 5))


def test_whole_removes_nothing(tiny: Any) -> None:
    assert outline("whole", tiny(), placement=Kept()) == Outline(tuple(range(6)), tuple(range(6)))
    assert outline("whole", tiny(), placement=Ends(1, 2)) == Outline(tuple(range(6)), (0, 4, 5))


@torch.no_grad()
def test_representations_are_means_weighted_by_position(family: str, tiny: Any, text: list[Batch]) -> None:
    model = tiny(family)
    found = pooled(model, text)
    assert found.shape == (6, 12, 32)
    assert not any(layer._forward_hooks for layer in layers(model))
    row = 0
    for batch in text:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            length = int(mask.sum())
            states = model(ids[None, :length], output_hidden_states=True).hidden_states[1:-1]  # the last is normed
            weights = torch.arange(1, length + 1.0)
            for layer, hidden in enumerate(states):
                expected = (hidden[0] * weights[:, None]).sum(dim=0) / weights.sum()
                torch.testing.assert_close(found[layer, row], expected, rtol=1e-3, atol=1e-4)
            row += 1


def stepwise(model: Any, jumps: set[int]) -> Any:
    """Make all layers add almost nothing, but those in `jumps`."""
    with torch.no_grad():
        for number, layer in enumerate(layers(model)):
            for name, weight in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(20.0 if number in jumps else 1e-3)
    return model


def test_crash_cuts_where_representations_jump(tiny: Any, text: list[Batch]) -> None:
    model = stepwise(tiny("llama", 9), {3, 6})
    found = outline("crash", model, text, placement=Ends(1, 1), keep=5)
    # Of the middle 1..7 the segments are 1-2, 3-5 and 6-7, of which the upper medians stay.
    assert found == Outline((0, 2, 4, 7, 8), (0, 8))
    assert outline("crash", model, text, placement=Spread(2), keep=3) == Outline((1, 4, 7), (1, 7))
    assert outline("crash", model, text, placement=Kept(), keep=3) == Outline((1, 4, 7), (1, 4, 7))


def test_crash_cuts_at_the_weakest_links_of_the_model(family: str, tiny: Any, text: list[Batch]) -> None:
    model = tiny(family)
    unlike = (1 - adjacent_cka(pooled(model, text))).log()[1:4]  # within the middle 1..4
    near = (unlike > unlike.max() - MARGIN).nonzero().flatten() + 1
    found = outline("crash", model, text, placement=Ends(1, 1), keep=4)
    halves = [(range(1, cut + 1), range(cut + 1, 5)) for cut in near.tolist()]
    assert found.layers in [(0, *(half[len(half) // 2] for half in both), 5) for both in halves]


def test_sharing_fills_the_gaps_with_the_nearest_layer(tiny: Any, text: list[Batch]) -> None:
    model = tiny()
    removed = outline("crash", model, text, placement=Ends(1, 1), keep=3)
    shared = outline("crash", model, text, placement=Ends(1, 1), keep=3, sharing="on")
    assert shared.layers == tuple(range(6)) and shared.trainable == removed.trainable == (0, 5)
    assert shared.shared == nearest(6, removed.layers)
    assert shared.places == {0: 0, 5: 5} and removed.places == {0: 0, 2: 5}


@pytest.mark.parametrize("seed", range(4))
def test_automatic_sharing_takes_the_likelier_stack(tiny: Any, text: list[Batch], seed: int) -> None:
    model = tiny()
    with torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    plans = {
        sharing: outline("crash", model, text, placement=Ends(1, 1), keep=3, sharing=sharing)
        for sharing in ("off", "on", "auto")
    }
    nll = {
        sharing: modality.score(restack(model, plan.layers, plan.shared), text).total for sharing, plan in plans.items()
    }
    assert nll["auto"] == min(nll["off"], nll["on"])
    assert nll["off"] != nll["on"]


@pytest.mark.parametrize("name", ["uniform", "crash"])
@pytest.mark.parametrize("keep", [4, 7])
def test_a_number_of_layers_that_does_not_fit_is_refused(tiny: Any, name: str, keep: int) -> None:
    with pytest.raises(ValueError, match=r"it must be in 5..6 for a base of 6 layers with 4 fixed, got " + str(keep)):
        outline(name, tiny(), keep=keep)


def test_ends_without_a_middle_are_refused(tiny: Any) -> None:
    for placement in (Ends(3, 3), Ends(0, 0), Ends(-1)):
        with pytest.raises(ValueError, match="bottom and top must leave a middle"):
            outline("uniform", tiny(), placement=placement, keep=5)


def test_more_layers_than_are_kept_cannot_train(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"count must be in 1..3, the layers that are kept, got 4"):
        outline("uniform", tiny(), placement=Spread(4), keep=3)


def test_crash_without_text_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="give calibration text"):
        outline("crash", tiny(), keep=5)


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no builder 'crush' .*known are .*crash"):
        make("crush", {})
    with pytest.raises(ValueError, match=r"'uniform' has no setting 'kepe' .*its settings are keep"):
        make("uniform", {"kepe": 3})
    with pytest.raises(ValueError, match=r"builder 'uniform': keep: "):
        make("uniform", {"keep": "many"})
    with pytest.raises(ValueError, match=r"builder 'crash': sharing: "):
        make("crash", {"keep": 5, "sharing": "maybe"})


def test_every_builder_is_listed_under_its_name() -> None:
    assert all(BUILDERS[name].name == name for name in BUILDERS)


def rounded(model: Any, seed: int) -> list[Any]:
    """Have every linear map's output off by as much as bf16 rounds, until the hooks are removed."""
    draw = torch.Generator().manual_seed(seed)

    def off(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 2**-8 * (2 * torch.rand(output.shape, generator=draw) - 1))

    return [m.register_forward_hook(off) for m in model.modules() if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
def tied(model: Any, text: list[Batch]) -> Any:
    """Scale what layer 6 adds until it is as unlike layer 5 as layer 3, which adds less than it might, is unlike 2."""

    def adding(number: int) -> list[torch.Tensor]:
        named = layers(model)[number].named_parameters()
        return [weight for name, weight in named if name.endswith(("o_proj.weight", "down_proj.weight"))]

    for weight in adding(3):
        weight.mul_(0.3)
    maps, low, high = adding(6), 0.01, 100.0
    originals = [weight.clone() for weight in maps]
    for _ in range(24):
        factor = (low * high) ** 0.5
        for weight, original in zip(maps, originals, strict=True):
            weight.copy_(factor * original)
        links = adjacent_cka(pooled(model, text))
        low, high = (factor, high) if links[5] > links[2] else (low, factor)
    return model


@pytest.mark.slow(alone=True)
def test_neither_the_rounding_of_bf16_nor_the_cut_into_batches_chooses_layers(tiny: Any, text: list[Batch]) -> None:
    model = tied(stepwise(tiny("llama", 9), {3, 6}), text)
    chosen, weakest = [], []
    for seed in range(7):
        hooks = rounded(model, seed) if seed else []
        chosen.append(outline("crash", model, text, placement=Ends(1, 1), keep=4, sharing="auto"))
        weakest.append(next(iter(cluster(pooled(model, text)[1:8], 2).strains)))
        for hook in hooks:
            hook.remove()
    assert len({*weakest}) == 2, "the links alone would swap layers"
    assert all(one == chosen[0] for one in chosen) and chosen[0].grounds and chosen[0].grounds.ways == 2
    assert outline("crash", model, longest(text, 12), placement=Ends(1, 1), keep=4, sharing="auto") == chosen[0]


def test_layers_are_chosen_in_fp32_whatever_the_model_computes_in(tiny: Any, text: list[Batch]) -> None:
    model = tiny("llama", 9).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    builder: Any = make("crash", {"keep": 6})
    found = builder.outline(model, text, Ends(1, 1))
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    alone = builder.outline(model.float(), text, Ends(1, 1))
    assert found == alone and found.grounds == alone.grounds
