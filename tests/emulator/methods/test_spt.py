"""SPT: as many values as asked for, where the squared gradients of all sites are largest."""

from typing import Any

import pytest
import torch
from torch import Tensor

from offsite.emulator import modality
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.methods import Adapter, make
from offsite.emulator.methods.base import Measuring, Place
from offsite.emulator.modality import Batch, collate, encode
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.tuning.loop import Schedule, tune

PLACES = {0: 0, 1: 5}


def squares(base: Any, batches: list[Batch], places: dict[int, int] = PLACES) -> Adapter:
    method = make("moments", {"of": "squares"})
    assert isinstance(method, Measuring)
    model = method.attach(base, places, method.start(base, places, seed=0))
    for batch in batches:
        method.measure(model, places, batch)
    return method.state(model, places)


def begun(base: Any, statistics: Adapter, places: dict[int, int] = PLACES, **settings: Any) -> Adapter:
    method: Any = make("spt", settings)
    adapter: Adapter = method.begin(base, places, statistics, seed=0)
    return adapter


def trained(adapter: Adapter) -> int:
    return sum(tensor.numel() for key, tensor in adapter.items() if key.rpartition(".")[2] in ("A", "B", "change"))


def places_of(adapter: Adapter) -> set[Any]:
    """What trains: the maps with pairs, and all entries of others."""
    pairs = {key for key in adapter if key.endswith(".A")}
    return pairs | {(key, at) for key in adapter if key.endswith(".index") for at in adapter[key].tolist()}


@pytest.mark.parametrize("share", [0.002, 0.03, 0.1])
def test_as_many_values_train_as_asked_for_and_pairs_are_where_most_sensitive_entries_are(
    share: float, tiny: Any, text: list[Batch]
) -> None:
    base = tiny(layers=2)
    statistics = squares(tiny(layers=2), text)
    adapter = begun(base, statistics, share=share, rank=2)
    wanted = share * sum(tensor.numel() for tensor in statistics.values())
    assert abs(trained(adapter) - wanted) <= max(0.02 * wanted, len(statistics))
    paired = [key[:-2] for key in adapter if key.endswith(".A")]
    alone = [key.removesuffix(".index") for key in adapter if key.endswith(".index")]
    assert {*paired} | {*alone} == {key.removesuffix(".squares") for key in statistics}
    limits = []
    for name in alone:
        score, at = statistics[f"{name}.squares"].flatten(), adapter[f"{name}.index"].long()
        others = score.index_fill(0, at, -1.0)
        assert len(at) >= 1 and float(score[at].min()) >= float(others.max())
        limits += [float(score[at].min())] if len(at) > 1 else []
    for name in paired:  # the least sensitive entry that trains alone is no more than what makes a pair
        score = statistics[f"{name}.squares"]
        level = score.flatten().topk(-(-2 * sum(score.shape) // 10)).values.min()
        assert all(float(level) >= 0.999 * limit for limit in limits)
    assert bool(paired) == (share > 0.002)


def test_the_structure_of_summed_squares_is_the_central_one(tiny: Any, text: list[Batch]) -> None:
    half = len(text) // 2
    parts = [squares(tiny(layers=2), some) for some in (text[:half], text[half:])]
    summed = {key: parts[0][key] + parts[1][key] for key in parts[0]}
    own, central = (
        places_of(begun(tiny(layers=2), one, share=0.1, rank=2)) for one in (summed, squares(tiny(layers=2), text))
    )
    assert len(own & central) / len(own | central) >= 0.99
    apart = places_of(begun(tiny(layers=2), parts[0], share=0.1, rank=2))
    assert len(apart & central) / len(apart | central) < 0.99, "one site alone has another"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_it_is_the_model_beside_it(family: str, tiny: Any, text: list[Batch], ids: Tensor) -> None:
    method, places = make("spt", {"share": 0.05, "rank": 2}), {0: 0, 1: 1}
    drawn = torch.Generator().manual_seed(0)
    adapter = {
        key: value + 0.05 * torch.randn(value.shape, generator=drawn) if value.is_floating_point() else value
        for key, value in begun(
            tiny(family, layers=2), squares(tiny(family, layers=2), text, places), places, share=0.05, rank=2
        ).items()
    }
    merged = tiny(family, layers=2)
    method.merge(merged, adapter)
    with torch.no_grad():
        attached = method.attach(tiny(family, layers=2), places, adapter)(ids).logits
        torch.testing.assert_close(merged(ids).logits, attached, rtol=1e-5, atol=2e-5)
        assert not torch.allclose(attached, tiny(family, layers=2)(ids).logits, atol=1e-3)


def test_what_cannot_be_is_refused(tiny: Any, text: list[Batch]) -> None:
    base, statistics = tiny(layers=2), squares(tiny(layers=2), text)
    with pytest.raises(ValueError, match="share asks for .* lower share, or raise rank"):
        begun(base, statistics, share=1.0, rank=1)
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        make("spt", {"ratio": 0.5})
    with pytest.raises(ValueError, match="the squares of 0.self_attn.q_proj were not measured"):
        begun(base, {key: value for key, value in statistics.items() if "q_proj" not in key})
    adapter = begun(base, statistics, share=0.1, rank=2)
    pair = next(key for key in adapter if key.endswith(".A"))
    name = pair.removesuffix(".A")
    both = adapter | {f"{name}.change": torch.zeros(1), f"{name}.index": torch.zeros(1, dtype=torch.int32)}
    with pytest.raises(ValueError, match="has a pair and entries of"):
        make("spt", {}).schema(both | {f"{name}.size": torch.tensor([1, 1], dtype=torch.int32)})


def counted(tokenizer: Any, step: int, rows: int, seed: int) -> list[Any]:
    """Samples that count in steps."""
    starts = torch.randint(0, 80, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [" ".join(f"w{3 + (start + step * at) % 80}" for at in range(16)) for start in starts]
    return encode([TextExample("", one) for one in texts], tokenizer, max_length=24)


@pytest.mark.slow
def test_a_hundredth_of_the_entries_learns_more_where_it_is_sensitive_than_where_it_is_random(
    tiny: Any, tokenizer: Any
) -> None:
    """A model that counts in ones learns to count in threes, by 1 % of the entries of its maps."""
    base, places = tiny(layers=2), {0: 0, 1: 1}
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    tune(base, dict(base.named_parameters()), counted(tokenizer, 1, 64, 0), Schedule(300, 0.01))
    task, held_out = counted(tokenizer, 3, 64, 1), counted(tokenizer, 3, 32, 2)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def fresh() -> Any:
        model = tiny(layers=2)
        model.load_state_dict(weights)
        return model

    sensitive = squares(fresh(), [collate(task[at : at + 8]) for at in range(0, 64, 8)], places)
    drawn = torch.Generator().manual_seed(0)
    random = {key: torch.rand(value.shape, generator=drawn) for key, value in sensitive.items()}
    losses = {}
    for name, statistics in (("sensitive", sensitive), ("random", random)):
        method = make("spt", {"share": 0.01})
        model = method.attach(fresh(), places, begun(fresh(), statistics, places, share=0.01))
        tune(model, method.named_parameters(model, places), task, Schedule(150, 0.02))
        losses[name] = modality.score(model, [collate(held_out)]).mean
    losses["before"] = modality.score(fresh(), [collate(held_out)]).mean
    assert losses["sensitive"] < losses["random"] - 0.3 < losses["before"] - 3.0, "in nats a token"


def test_a_start_without_what_was_measured_has_both_kinds_and_as_many_values(tiny: Any) -> None:
    start = make("spt", {"share": 0.1}).start(tiny(layers=2), PLACES, seed=0)
    kinds = {key.rpartition(".")[2] for key in start}
    assert kinds == {"A", "B", "change", "index", "size"}
    total = sum(layers(tiny(layers=2))[at].get_submodule(p.path).weight.numel() for at, p in _maps(start))
    assert trained(start) == pytest.approx(0.1 * total, rel=0.02)


def _maps(adapter: Adapter) -> list[tuple[int, Place]]:
    position = {layer: at for at, layer in PLACES.items()}
    names = {key.rpartition(".")[0] for key in adapter}
    return [(position[int(n.partition(".")[0])], Place(int(n.partition(".")[0]), n.partition(".")[2])) for n in names]
