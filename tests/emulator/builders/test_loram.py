from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.opt.modeling_opt import OPTAttention

from offsite.emulator import modality
from offsite.emulator.anatomy.roles import roles
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import find, layers, linears, shape
from offsite.emulator.builders import Material, make, run
from offsite.emulator.formats.packed import dense
from offsite.emulator.methods import make as make_method
from offsite.emulator.modality import Batch
from offsite.emulator.outline import Draft, Outline
from offsite.emulator.placements import Kept

METHOD = make_method("lora", {"rank": 3, "alpha": 6})
INNER = [1, 2]  # of four layers, with one left intact at each end


def half(family: str) -> dict[str, Any]:
    """Half of the MLP and, where it may be pruned, of the attention."""
    return {"mlp": 0.5, "attention": 0.0 if family == "bloom" else 0.5, "first": 1, "last": 1}


def draft_of(base: Any, outline: Outline | None = None, **settings: Any) -> Draft:
    every = tuple(range(len(layers(base))))
    outline = outline or Outline(every, every)
    draft = Draft(base, restack(base, outline.layers, outline.shared), outline)
    return make("loram", settings).change(draft, Material())


def masked(model: Any, draft: Draft) -> Any:
    """The full model, with the columns that were pruned set to zero."""
    twin = restack(model, range(len(layers(model))))
    for name, columns in draft.recovery.items():
        if name.endswith(".columns"):
            layer, _, path = name.removesuffix(".columns").partition(".")
            linear = layers(twin)[int(layer)].get_submodule(path)
            dropped = torch.ones(shape(linear)[1], dtype=torch.bool)
            dropped[columns] = False
            weight = linear.weight.detach().clone()
            weight[dropped if model.config.model_type == "gpt2" else (slice(None), dropped)] = 0
            linear.weight = torch.nn.Parameter(weight)
    return twin


def trained(model: Any, places: dict[int, int]) -> dict[str, Tensor]:
    start = METHOD.start(model, places, seed=0)
    torch.manual_seed(1)
    return {key: value + 0.1 * torch.randn_like(value) for key, value in start.items()}


@torch.no_grad()
def test_a_narrow_model_is_the_full_one_with_what_was_pruned_masked(family: str, tiny: Any, ids: torch.Tensor) -> None:
    base = tiny(family, 4)
    draft = draft_of(base, **half(family))
    full = masked(base, draft)
    torch.testing.assert_close(draft.model(ids).logits, full(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(draft.model(ids).logits, base(ids).logits, atol=1e-2)
    texts = [
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache, pad_token_id=0, eos_token_id=None)
        for model, cache in ((draft.model, True), (full, False))
    ]
    assert texts[0].shape == (2, 18) and torch.equal(*texts)


def test_half_of_all_but_the_outer_layers_is_kept_in_order(family: str, tiny: Any) -> None:
    base = tiny(family, 4)
    draft = draft_of(base, **half(family))
    for place, layer in enumerate(layers(draft.model)):
        found, full = roles(base, place), layers(base)[place]
        for path in linears(layer):
            before, after = shape(full.get_submodule(path)), shape(layer.get_submodule(path))
            kept = place not in INNER or (path in found.attention and family == "bloom")
            inward = path in (found.output, found.mlp_out)
            assert after == (before if kept else (before[0], before[1] // 2) if inward else (before[0] // 2, before[1]))
            rows = draft.recovery.get(f"{place}.{path}.{'columns' if inward else 'rows'}")
            assert (rows is None) == kept
            if rows is not None:
                assert rows.dtype == torch.int64 and (rows.diff() > 0).all()
                expected = dense(full.get_submodule(path)).index_select(int(inward), rows)
                assert torch.equal(dense(layer.get_submodule(path)), expected)
                assert draft.recovery[f"{place}.{path}.shape"].tolist() == [*before]


@torch.no_grad()
def test_the_base_and_the_given_draft_stay_as_they_were(family: str, tiny: Any, ids: torch.Tensor) -> None:
    base = tiny(family, 4)
    before = Draft(base, restack(base, range(4)), Outline(tuple(range(4)), (0,)), recovery={"0.x.scale": torch.ones(1)})
    shapes = {name: value.shape for name, value in before.model.state_dict().items()}
    logits = base(ids).logits
    after = make("loram", half(family)).change(before, Material())
    assert torch.equal(base(ids).logits, logits) and torch.equal(before.model(ids).logits, logits)
    assert {name: value.shape for name, value in before.model.state_dict().items()} == shapes
    assert [*before.recovery] == ["0.x.scale"] and before.recovery.items() <= after.recovery.items()
    inner = layers(after.model)[2], layers(base)[2]
    found = roles(base, 2)
    for path in (found.mlp_out, *found.mlp_in):
        mine, theirs = (layer.get_submodule(path).weight for layer in inner)
        assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
    assert all(a is b for a, b in zip(layers(after.model)[0].parameters(), layers(base)[0].parameters(), strict=True))


def test_a_recovered_change_is_exact_where_kept_and_zero_elsewhere(family: str, tiny: Any) -> None:
    draft = draft_of(tiny(family, 4), **half(family))
    small = trained(draft.model, draft.outline.places)
    wide = METHOD.recover(small, draft.recovery)
    for key in [key for key in small if key.endswith(".A")]:
        name = key.removesuffix(".A")
        change = 2.0 * small[f"{name}.B"] @ small[key]
        found = 2.0 * wide[f"{name}.B"] @ wide[key]
        layer, _, path = name.partition(".")
        assert found.shape == shape(layers(draft.base)[int(layer)].get_submodule(path))
        rows = draft.recovery.get(f"{name}.rows", torch.arange(len(found)))
        columns = draft.recovery.get(f"{name}.columns", torch.arange(found.shape[1]))
        torch.testing.assert_close(found[rows][:, columns], change, rtol=1e-6, atol=0)
        found[rows[:, None], columns] = 0
        assert not found.any()
        assert change.any()


@torch.no_grad()
def test_training_the_narrow_model_is_training_the_masked_one(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Recovered and merged into the base, then masked: what the site saw with the adapter on the narrow model."""
    base = tiny(family, 4)
    draft = draft_of(base, **half(family))
    small = trained(draft.model, draft.outline.places)
    seen = METHOD.attach(draft.model, draft.outline.places, small)(ids).logits
    METHOD.merge(base, METHOD.recover(small, draft.recovery))
    torch.testing.assert_close(seen, masked(base, draft)(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_peft_loads_a_recovered_adapter_on_the_full_base(
    family: str, tiny: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    base = tiny(family, 4)
    draft = draft_of(base, **half(family))
    wide = METHOD.recover(trained(draft.model, draft.outline.places), draft.recovery)
    METHOD.export(tmp_path, wide, base=base, base_name="owner/base")
    before, loaded = base(ids).logits, PeftModel.from_pretrained(restack(base, range(4)), tmp_path)(ids).logits
    METHOD.merge(base, wide)
    torch.testing.assert_close(loaded, base(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(loaded, before, atol=1e-2)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox"])
def test_lora_trains_on_the_narrow_model(family: str, tiny: Any, text: list[Batch]) -> None:
    draft = draft_of(tiny(family, 4), **half(family))
    places = draft.outline.places
    attached = METHOD.attach(draft.model, places, METHOD.start(draft.model, places, seed=0))
    live = METHOD.named_parameters(attached, places)
    optimiser = torch.optim.Adam(live.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = modality.loss(attached, text[0])
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in live.values())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(parameter.any() for key, parameter in live.items() if key.endswith(".B"))


@torch.no_grad()
def test_places_that_share_their_parameters_share_the_narrow_ones(family: str, tiny: Any, ids: torch.Tensor) -> None:
    base = tiny(family, 4)
    outline = Outline(tuple(range(4)), (0, 3), {1: 2})
    draft = draft_of(base, outline, **half(family))
    stack = layers(draft.model)
    assert all(a is b for a, b in zip(stack[1].parameters(), stack[2].parameters(), strict=True))
    assert not {id(module) for module in stack[1].modules()} & {id(module) for module in stack[2].modules()}
    assert {int(name.partition(".")[0]) for name in draft.recovery} == {2}
    full = restack(masked(base, draft), range(4), outline.shared)
    torch.testing.assert_close(draft.model(ids).logits, full(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_was_kept_is_told_by_the_layers_of_the_base(tiny: Any) -> None:
    draft = draft_of(tiny("llama", 8), Outline((0, 3, 5, 7), (0, 7)), first=1, last=1)
    assert {int(name.partition(".")[0]) for name in draft.recovery} == {3, 5}


def test_width_follows_depth_in_a_chain(tiny: Any, text: list[Batch]) -> None:
    chain = [make("uniform", {"keep": 4}), make("loram", {"first": 1, "last": 1, "score": "activation"})]
    draft = run(chain, Kept(), tiny("llama", 6), Material(batches=text))
    assert len(layers(draft.model)) == 4 and draft.recovery
    assert chain[1].looks_at_text and not make("loram", {}).looks_at_text


@pytest.mark.parametrize(("share", "kept"), [(0.25, 36), (0.5, 24), (0.99, 1), (0.02, 47)])
def test_the_share_of_channels_is_what_goes(tiny: Any, share: float, kept: int) -> None:
    draft = draft_of(tiny("llama", 5), mlp=share)
    assert [layer.mlp.down_proj.in_features for layer in layers(draft.model)] == [48, 48, kept, 48, 48]


def test_settings_that_prune_nothing_or_everything_are_refused(tiny: Any) -> None:
    for settings in ({"mlp": 1.0}, {"mlp": -0.1}, {"attention": 1.5}, {"mlp": 0.0}):
        with pytest.raises(ValueError, match=r"each must be in \[0, 1\) and one of them above 0"):
            make("loram", settings)
    with pytest.raises(ValueError, match="first and last count layers left intact, got -1 and 2"):
        make("loram", {"first": -1})
    with pytest.raises(ValueError, match=r"no layer is left to prune: the emulator has \[0, 1, 2, 3, 4\] of .* 5"):
        draft_of(tiny("llama", 5), first=3)
    with pytest.raises(
        ValueError, match="mlp = 0.001: a layer has 48 channels of the MLP, of which this share is none"
    ):
        draft_of(tiny("llama", 5), mlp=0.001)
    with pytest.raises(ValueError, match="takes calibration text"):
        draft_of(tiny("llama", 5), score="activation")


def test_attention_that_cannot_be_pruned_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="ALiBi"):
        draft_of(tiny("bloom", 5), attention=0.5)
    config = tiny("llama", 5).config
    config.num_key_value_heads = 1
    multi_query = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="attention = 0.5: a layer has 1 KV groups of the attention"):
        draft_of(multi_query, attention=0.5)
    assert find(draft_of(multi_query).model).layers[2].mlp.up_proj.out_features == 24


@pytest.mark.parametrize(("family", "wrong"), [("gpt2", "groups"), ("gpt_neox", "blocks")])
def test_a_layout_that_is_described_wrongly_is_found_out(tiny: Any, family: str, wrong: str) -> None:
    base = tiny(family, 4)
    right = asdict(roles(base, 0))
    base.config.anatomy = {name: value for name, value in right.items() if value}
    assert draft_of(base, **half(family)).recovery
    base.config.anatomy = base.config.anatomy | {"fused": wrong}
    with pytest.raises(ValueError, match="this family uses its maps otherwise than described"):
        draft_of(base, **half(family))
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_attention_that_counts_its_heads_elsewhere_is_found_out(tiny: Any) -> None:
    base = tiny("opt", 4)
    for layer in layers(base):
        layer.self_attn.__class__ = Elsewhere
    with pytest.raises(ValueError, match="otherwise than described|cannot be narrowed as described"):
        draft_of(base, **half("opt"))


class Elsewhere(OPTAttention):
    """An attention that does not take its number of heads from where others do."""

    num_heads = property(lambda self: 4, lambda self, value: None)
