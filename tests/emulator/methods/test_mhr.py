"""MHR: skills that tasks share, of which each mixes its own; and new tasks that train nothing but their mixture."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.coordinator import aggregation, memory
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.aggregation.keyed import Share, fold_keyed
from offsite.coordinator.memory import Moment
from offsite.emulator import modality, parts
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.mhr import GAIN, mixed, shares
from offsite.emulator.modality import collate, encode
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.parts import Turn
from offsite.emulator.parts.training import Trained, freeze, whole_schema
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.kernels.schema import groups, only

PLACES = {0: 0, 4: 4}
NAME = "4.mlp.down_proj"


def moved(adapter: Adapter, *, seed: int) -> Adapter:
    """An adapter that has learned something."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        key: tensor + (0.01 if key.endswith("routing") else 0.3) * torch.randn(tensor.shape, generator=drawn)
        for key, tensor in adapter.items()
    }


def parts_of(adapter: Adapter, name: str = NAME) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in adapter.items() if key.startswith(name)}


@torch.no_grad()
def test_one_skill_and_one_head_are_lora(tiny: Any, ids: Tensor) -> None:
    method, lora = (
        make("mhr", {"skills": 1, "heads": 1, "rank": 3, "alpha": 6.0}),
        make("lora", {"rank": 3, "alpha": 6.0}),
    )
    adapter = moved(method.start(tiny(), PLACES, seed=0), seed=1)
    plain = {key: tensor.flatten(0, 2) if key.endswith("A") else tensor[0, 0] for key, tensor in adapter.items()}
    plain = {key: tensor for key, tensor in plain.items() if not key.endswith("routing")}
    expected = lora.attach(tiny(), PLACES, plain)(ids).logits
    assert not torch.allclose(expected, tiny()(ids).logits, atol=1e-2)
    torch.testing.assert_close(method.attach(tiny(), PLACES, adapter)(ids).logits, expected)


@torch.no_grad()
def test_a_map_answers_as_pefts_poly_does(tiny: Any) -> None:
    import peft

    method = make("mhr", {"skills": 3, "heads": 2, "rank": 4, "alpha": 1.0, "modules": ("down_proj",)})
    adapter = moved(method.start(tiny(), {4: 4}, seed=0), seed=1)
    config = peft.PolyConfig(r=4, n_tasks=1, n_skills=3, n_splits=2, target_modules=r".*\.4\.mlp\.down_proj")
    poly = peft.get_peft_model(tiny(), config).eval()
    own = parts_of(adapter)
    (layer,) = (module for name, module in poly.named_modules() if name.endswith("4.mlp.down_proj"))
    layer.poly_lora_A["default"].copy_(own["A"].transpose(2, 3))
    layer.poly_lora_B["default"].copy_(own["B"].transpose(2, 3))
    layer.poly_router["default"].module_logits.copy_(GAIN * own["routing"].flatten()[None])
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(2))
    answer = method.attach(tiny(), {4: 4}, adapter).get_submodule(f"model.layers.{NAME}")(x)
    torch.testing.assert_close(answer, layer(x, task_ids=torch.zeros(2, dtype=torch.long)))


def test_shares_sum_to_one_and_alike_logits_give_the_mean_of_the_skills() -> None:
    drawn = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 5, 3, 8, generator=drawn), torch.randn(2, 5, 6, 3, generator=drawn)
    for routing in (torch.zeros(2, 5), torch.randn(2, 5, generator=drawn)):
        torch.testing.assert_close(shares(routing).sum(-1), torch.ones(2))
    torch.testing.assert_close(
        mixed(A, B, torch.full((2, 5), 0.02)), (A.mean(1).transpose(0, 1).flatten(1), B.mean(1).flatten(0, 1))
    )
    one = torch.full((2, 5), -1.0).index_fill(1, torch.tensor(3), 1.0)
    torch.testing.assert_close(mixed(A, B, one).B, B[:, 3].flatten(0, 1))


def test_a_new_task_that_trains_its_mixture_alone_learns_by_what_others_have_and_leaves_that(
    tiny: Any, tokenizer: Any
) -> None:
    method, part, strategy = (
        make("mhr", {"skills": 4, "heads": 2}),
        parts.make("by-task", {}),
        aggregation.make("mean", {}),
    )
    store = memory.make("shard-store", {"c": 0.0})
    start = method.start(tiny(), PLACES, seed=0)
    schema, begun = method.schema(start), Version(start, {"": start})
    texts = {
        task: encode(
            [TextExample("", " ".join(f"w{3 + (step * at + row) % 80}" for at in range(12))) for row in range(8)],
            tokenizer,
            max_length=16,
        )
        for task, step in {"law": 7, "physic": 11}.items()
    }

    base = tiny()

    def learn(adapter: Adapter, task: str, *, own: bool) -> Adapter:
        model = method.attach(copy.deepcopy(base), PLACES, adapter)
        live = method.named_parameters(model, PLACES)
        if own:
            whole = whole_schema(method, adapter)
            live = freeze(live, Trained(only(whole, part.groups(whole, Turn(0, 0, "ward")))))
            assert len(live) == len(PLACES) * 7
        tune(model, live, texts[task], Schedule(12, 0.02))
        return method.state(model, PLACES)

    def loss(adapter: Adapter, task: str) -> float:
        model = method.attach(copy.deepcopy(base), PLACES, adapter)
        with torch.no_grad():
            return float(modality.loss(model, collate(texts[task])))

    law = learn(start, "law", own=False)
    first = store.after(begun, Version(law, {"": law}), schema, Moment(1, 1, 12, 0, "law"))
    second = store.begin(first, begun, schema, Moment(0, 1, 12, 1, "physic"))
    routing = {key for key in start if key.endswith("routing")}
    assert all(torch.equal(second.adapter[key], (start if key in routing else law)[key]) for key in start)
    update = learn(second.adapter, "physic", own=True)
    trained = part.groups(schema, Turn(0, 0, "ward"))
    assert trained == routing and sum(update[key].numel() for key in trained) == 2 * 7 * 2 * 4
    sent = [(Origin("ward", "", 1.0), nullcontext({key: update[key] for key in trained}))]
    folded = fold_keyed(strategy, second, schema, sent, tiers=[""], shares={"ward": Share(1.0, trained)})
    last = store.after(second, folded, schema, Moment(1, 1, 12, 1, "physic"))
    experts = store.experts(last)
    assert loss(experts["physic"], "physic") < 0.99 * loss(second.adapter, "physic")
    assert all(torch.equal(experts["law"][key], law[key]) for key in law), "not a bit of an earlier task has changed"


def test_part_by_task_leaves_what_is_shared_and_needs_both(tiny: Any) -> None:
    part = parts.make("by-task", {})
    method = make("mhr", {})
    schema = method.schema(method.start(tiny(), PLACES, seed=0))
    assert part.groups(schema, Turn(0, 3, "ward")) == {key for key in groups(schema) if key.endswith("routing")}
    lora = make("lora", {})
    with pytest.raises(ValueError, match="this adapter has no tensors of that kind; use a method with both"):
        part.fits(lora.schema(lora.start(tiny(), PLACES, seed=0)))
    with pytest.raises(ValueError, match="this adapter has nothing else"):
        part.fits({key: schema[key] for key in schema if key.endswith("routing")})
    mos = make("mos", {"pools": 8, "modules": ("down_proj",)})
    pooled = mos.schema(mos.start(tiny(), PLACES, seed=0))
    assert {group.rpartition(".")[2] for group in part.groups(pooled, Turn(0, 0, "ward"))} == {"4", "5", "6", "7"}


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"has \(d_out, d_in\) = \(\d+, \d+\), which 5 heads do not divide"):
        make("mhr", {"heads": 5}).fits(tiny(), PLACES)
    method = make("mhr", {})
    with pytest.raises(ValueError, match="with 7 skills of rank 1 and 4 heads a linear map of"):
        make("mhr", {"skills": 7}).attach(tiny(), PLACES, copy.deepcopy(method.start(tiny(), PLACES, seed=0)))
    with pytest.raises(ValueError, match="skills, rank and heads must be at least 1"):
        make("mhr", {"skills": 0})
