"""Starts that are made of a map's weights: those of the papers, taken off again, on a base that stays what it is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from offsite.emulator import builders, modality
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import is_transposed, layers
from offsite.emulator.builders import Material
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import factors
from offsite.emulator.methods.initial import INITS
from offsite.emulator.placements import Ends
from offsite.emulator.plug import plug
from offsite.kernels.schema import Rule, settle

PLACES = {0: 0, 4: 4}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=INITS)
def init(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def trained(adapter: Adapter) -> Adapter:
    """An adapter whose A and B have moved on from A0 and B0."""
    drawn = torch.Generator().manual_seed(1)
    return {
        key: value if key.endswith("0") else value + 0.1 * torch.randn(value.shape, generator=drawn)
        for key, value in adapter.items()
    }


def weight(model: Any, layer: int, path: str) -> Tensor:
    linear = layers(model)[layer].get_submodule(path)
    own: Tensor = linear.get_parameter("weight").detach()
    return own.T if is_transposed(linear) else own


def coarse(model: Any) -> Any:
    """A model whose weights are bf16's already, so that rounding to it changes nothing."""
    return model.to(torch.bfloat16).float()


@pytest.mark.parametrize(
    ("init", "family"),
    [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")],  # of GPT-2's maps peft's OLoRA takes the transposes
)
def test_a_product_is_that_of_peft_and_it_is_taken_off_the_weights_that_peft_leaves(
    init: str, family: str, tiny: Any
) -> None:
    base = coarse(tiny(family, layers=1))
    method = make("lora", {"rank": 4, "alpha": 6.0, "init": init})
    start = method.start(base, {0: 0}, seed=0)
    paths = [place.path for place in factors({key: value for key, value in start.items() if not key.endswith("0")})]
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=init, target_modules=paths, fan_in_fan_out=family == "gpt2"
    )
    theirs = get_peft_model(coarse(tiny(family, layers=1)), config)
    for path in paths:
        A, B = start[f"0.{path}.A"], start[f"0.{path}.B"]
        wrapped: Any = layers(theirs)[0].get_submodule(path)
        left = weight(base, 0, path) - 1.5 * B @ A
        has = wrapped.base_layer.weight.T if family == "gpt2" else wrapped.base_layer.weight
        torch.testing.assert_close(left, has.detach(), rtol=1e-3, atol=1e-4)  # peft computes it in fp32


def test_pissa_takes_the_largest_part_with_balanced_factors_and_olora_orthonormal_columns(tiny: Any) -> None:
    base = coarse(tiny(layers=1))
    for init in INITS:
        start = make("lora", {"rank": 5, "alpha": 10.0, "init": init}).start(base, {0: 0}, seed=0)
        A, B = start["0.mlp.up_proj.A"].double(), start["0.mlp.up_proj.B"].double()
        W = weight(base, 0, "mlp.up_proj").double()
        if init == "pissa":
            torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-4, atol=1e-4)
            rest = torch.linalg.svdvals(W)[5:].norm()
            assert (W - 2.0 * B @ A).norm() <= 1.001 * rest
        else:
            torch.testing.assert_close(B.T @ B, torch.eye(5).double(), **CLOSE)
            torch.testing.assert_close(B @ B.T @ W, B @ A, **CLOSE)
            torch.testing.assert_close((B @ A)[:, :5], W[:, :5], **CLOSE)


@torch.no_grad()
def test_what_is_trained_is_one_model_attached_merged_and_in_stock_peft_on_the_untouched_base(
    init: str, family: str, tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    method = make("lora", {"rank": 4, "alpha": 6.0, "init": init})
    adapter = trained(method.start(tiny(family), PLACES, seed=0))
    merged, attached = tiny(family), method.attach(tiny(family), PLACES, adapter)(ids).logits
    method.merge(merged, adapter)
    torch.testing.assert_close(merged(ids).logits, attached, rtol=1e-4, atol=1e-4)
    method.export(tmp_path, adapter, base=tiny(family), base_name="owner/base")
    torch.testing.assert_close(PeftModel.from_pretrained(tiny(family), tmp_path)(ids).logits, attached, **CLOSE)
    assert not torch.allclose(tiny(family)(ids).logits, attached, atol=1e-3)


def test_fixed_factors_are_frozen_buffers_and_ranks_of_maps_hold_for_them_too(init: str, tiny: Any) -> None:
    method = make("lora", {"init": init, "rank_pattern": {"down_proj": 3}})
    start = method.start(tiny(), PLACES, seed=0)
    schema = settle(method.schema(start), {key: value.shape for key, value in start.items()})
    assert {key.rpartition(".")[2] for key, field in schema.items() if field.rule is Rule.FIXED} == {"A0", "B0"}
    assert start["0.mlp.down_proj.A0"].shape[0] == 3 and start["0.mlp.up_proj.A0"].shape[0] == 8
    model = method.attach(tiny(), PLACES, start)
    buffers = {id(buffer) for buffer in model.buffers()}
    frozen = [tensor for name, tensor in model.state_dict(keep_vars=True).items() if ".first." in name]
    assert len(frozen) == len(start) // 2 and all(id(tensor) in buffers for tensor in frozen)
    assert not any(".first." in name for name, _ in model.named_parameters())


def test_a_start_does_not_depend_on_precision_seed_or_which_layers_train(init: str, tiny: Any) -> None:
    method, base = make("lora", {"init": init}), tiny()
    start = method.start(base, {0: 0, 5: 5}, seed=0)
    narrow = method.start(restack(tiny(), [0, 3, 5]).to(torch.bfloat16), {0: 0, 2: 5}, seed=1)
    assert start.keys() == narrow.keys() and all(torch.equal(start[key], narrow[key]) for key in start)


def test_a_start_changes_nothing_of_a_bf16_model_beyond_its_rounding(init: str, tiny: Any, ids: Tensor) -> None:
    method, model = make("lora", {"init": init}), tiny().to(torch.bfloat16)
    with torch.no_grad():
        before = model(ids).logits
        attached = method.attach(model, {0: 0}, method.start(model, {0: 0}, seed=0))
        torch.testing.assert_close(attached(ids).logits, before, rtol=0.02, atol=0.02)
    assert {p.dtype for p in attached.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("builder", "settings"), [("loram", {"first": 0, "last": 0}), ("quantised", {"layers": "all", "block": 16})]
)
@torch.no_grad()
def test_a_start_of_altered_layers_changes_neither_emulator_nor_base(
    init: str, builder: str, settings: dict[str, Any], tiny: Any, ids: Tensor
) -> None:
    base, method = tiny(layers=3), make("lora", {"init": init})
    material = Material(batches=[modality.default().probe(base, rows=2, length=8)])
    chain = [builders.make("whole", {}), builders.make(builder, settings)]
    draft = builders.run(chain, Ends(1, 1), base, material)
    start = method.start(draft.model, draft.outline.places, seed=0)
    before, original = draft.model(ids).logits, tiny(layers=3)(ids).logits
    attached = method.attach(draft.model, draft.outline.places, start)
    torch.testing.assert_close(attached(ids).logits, before, **CLOSE)
    recovered = method.recover(method.state(attached, draft.outline.places), draft.recovery)
    torch.testing.assert_close(plug(tiny(layers=3), method, recovered)(ids).logits, original, **CLOSE)
    moved = method.recover(trained(start), draft.recovery)
    merged = tiny(layers=3)
    method.merge(merged, moved)
    torch.testing.assert_close(
        plug(tiny(layers=3), method, moved)(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("ones", [0, 2])
def test_where_a_map_has_too_few_directions_the_others_start_as_loras(ones: int) -> None:
    W = torch.zeros(12, 9)
    W[range(ones), range(ones)] = 1.0
    A, B = INITS["pissa"](W, 4, 2.0)
    torch.testing.assert_close(2.0 * B @ A, W, **CLOSE)
    assert (B.norm(dim=0) > 0).sum() == ones and bool((A.norm(dim=1) > 0).all())


def test_what_does_not_go_with_a_start_of_weights_is_refused(init: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=rf"method 'lora': init '{init}' has one start, .* leave out ranks, or take"):
        make("lora", {"init": init, "ranks": {"small": 2}})
    with pytest.raises(
        ValueError, match=re.escape("rank 33 is more than 0.self_attn.q_proj (32, 32) has, 32, and init")
    ):
        make("lora", {"init": init, "rank": 33}).fits(tiny(), {0: 0})
    start = make("lora", {}).start(tiny(), {0: 0}, seed=0)
    with pytest.raises(ValueError, match=f"with init '{init}' an adapter has A and B of a map, and A0 and B0"):
        make("lora", {"init": init}).attach(tiny(), {0: 0}, start)
    with pytest.raises(ValueError, match=r"init\S*: Input should be 'random', 'pissa' or 'olora'"):
        make("lora", {"init": "evah"})
