from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.emulator import modality, zoo
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.builders import make as builder
from offsite.emulator.evaluation.inspection import Findings, inspect
from offsite.emulator.methods import make
from offsite.emulator.modality import encode
from offsite.emulator.modality.causal_text.batch import TokenBatch
from offsite.emulator.modality.causal_text.encoding import IGNORED
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.placements import Ends

PLACES = {0: 0, 1: 1, 4: 4, 5: 5}


def pipe(model: Any, *places: int) -> Any:
    """Make layers hand their input on: nothing is added to the residual stream."""
    with torch.no_grad():
        for place in places:
            layers(model)[place].self_attn.o_proj.weight.zero_()
            layers(model)[place].mlp.down_proj.weight.zero_()
    return model


def test_an_honest_model_raises_no_suspicion(family: str, tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny(family)
    found = inspect(model, text, PLACES)
    assert found.suspicions() == []
    assert found.perplexity == pytest.approx(modality.score(model, text).perplexity)
    assert found.change.keys() == {2, 3} and found.likeness.keys() == found.context.keys() == {1, 4, 5}
    assert not any(layer._forward_hooks for layer in layers(model))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "bloom"])
def test_the_figures_are_those_of_the_hidden_states_of_real_tokens(
    name: str, tiny: Any, text: list[TokenBatch]
) -> None:
    model = tiny(name)
    found = inspect(model, text, PLACES)
    states = []
    for batch in text:
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            states.append(model(row[None, : int(mask.sum())], output_hidden_states=True).hidden_states)
    read = [torch.cat([state[place][0] for state in states]) for place in range(6)]  # what each layer reads
    for place in (2, 3):
        change = (read[place + 1] - read[place]).norm(dim=-1) / read[place].norm(dim=-1)
        assert found.change[place] == pytest.approx(float(change.median()), rel=1e-3)
    for place in (1, 4, 5):
        cosine = torch.cosine_similarity(read[place], read[0], dim=-1)
        assert found.likeness[place] == pytest.approx(float(cosine.abs().median()), rel=1e-3, abs=1e-5)


def test_a_pipe_of_frozen_layers_is_named_place_by_place(tiny: Any, text: list[TokenBatch]) -> None:
    found = inspect(pipe(tiny(), 2, 3), text, PLACES)
    assert found.change == {2: 0.0, 3: 0.0}
    sentences = found.suspicions()
    assert len(sentences) == 2
    for place, sentence in zip((2, 3), sentences, strict=True):
        assert f"place {place} " in sentence and "relative change 0," in sentence


def test_an_adapter_of_a_later_round_makes_a_pipe_of_an_honest_emulator(tiny: Any, text: list[TokenBatch]) -> None:
    """So what was found of an emulator in one round says nothing of the next, though its files are the same."""
    lora, draw = make("lora", {"rank": 4}), torch.Generator().manual_seed(0)
    model = tiny()
    adapter = lora.start(model, PLACES, seed=0)
    assert inspect(lora.attach(tiny(), PLACES, adapter), text, PLACES).suspicions() == []
    adapter["1.mlp.down_proj.B"].normal_(std=1e4, generator=draw)  # beside it all that frozen layers add is nothing
    found = inspect(lora.attach(model, PLACES, adapter), text, PLACES)
    assert [place for place, change in found.change.items() if change < 1e-2] == [2, 3]
    assert "place 2 hands its input on" in found.suspicions()[0]


def test_embeddings_that_reach_a_training_layer_are_named(tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny()
    for layer in layers(model)[:4]:
        layer.forward = lambda hidden, *_, **__: -1.5 * hidden  # changes its input, and keeps all it says
    found = inspect(model, text, {3: 3, 4: 4})
    assert found.change == pytest.approx({0: 2.5, 1: 2.5, 2: 2.5, 5: found.change[5]})
    assert found.likeness == pytest.approx({3: 1.0, 4: 1.0})
    assert found.context == {3: 0.0, 4: 0.0}
    for place, sentence in zip((3, 4, 3, 4), found.suspicions(), strict=True):
        assert f"place {place} " in sentence and ("cosine 1.0000" in sentence or "reads each word apart" in sentence)


def test_layers_that_turn_each_word_into_something_else_by_itself_are_named(tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny()
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    for layer in layers(model)[:4]:
        layer.forward = lambda hidden, *_, **__: hidden @ turn
    found = inspect(model, text, {4: 4, 5: 5})
    assert max(found.likeness.values()) < 0.9 and min(found.change.values()) > 0.1, "the other signs are not there"
    assert found.context[4] == 0 < found.context[5]
    (sentence,) = found.suspicions()
    assert "place 4 reads each word apart from those before it" in sentence


def test_a_word_alone_has_no_words_before_it(tiny: Any) -> None:
    one = torch.tensor([[5], [7]])
    two = TokenBatch(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.int64), torch.tensor([[IGNORED, 6]]))
    assert inspect(tiny(), [two], PLACES).suspicions() == []
    with pytest.raises(ValueError, match="no token to predict"):
        inspect(tiny(), [TokenBatch(one, torch.ones_like(one), one)], PLACES)


def test_training_layers_that_are_a_pipe_themselves_are_found_too(tiny: Any, text: list[TokenBatch]) -> None:
    found = inspect(pipe(tiny(), 0), text, PLACES)
    embedded, apart = found.suspicions()
    assert "place 1 still reads the embeddings" in embedded and "place 1 reads each word apart" in apart


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_each_tensor_with_a_value_that_is_not_finite_is_named(tiny: Any, text: list[TokenBatch], value: float) -> None:
    model = tiny()
    with torch.no_grad():
        layers(model)[3].mlp.up_proj.weight[1, 2] = value
        model.model.rotary_emb.inv_freq[0] = value
    found = inspect(model, text, PLACES)
    assert set(found.infinite) == {"model.layers.3.mlp.up_proj.weight", "model.rotary_emb.inv_freq"}
    assert len(found.suspicions()) == 2 and found.infinite[0] in found.suspicions()[0]


def test_a_perplexity_that_is_no_number_is_suspected() -> None:
    honest = Findings((), likelihood=modality.Score(30.0, 10), vocabulary=96, change={}, likeness={}, context={})
    assert honest.suspicions() == []
    assert len(replace(honest, likelihood=modality.Score(float("nan"), 10)).suspicions()) == 1


def test_padding_has_no_say(tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny()
    padded = [
        TokenBatch(
            *(
                torch.nn.functional.pad(part, (0, 30), value=value)
                for part, value in ((batch.input_ids, 0), (batch.attention_mask, 0), (batch.labels, IGNORED))
            )
        )
        for batch in text
    ]
    found, other = inspect(model, text, PLACES), inspect(model, padded, PLACES)
    assert found.change == pytest.approx(other.change, rel=1e-4)
    assert found.likeness == pytest.approx(other.likeness, rel=1e-4)


def test_an_adapter_that_changes_nothing_changes_no_figure(tiny: Any, text: list[TokenBatch]) -> None:
    model, method = tiny(), make("lora", {})
    before = inspect(model, text, PLACES)
    attached = method.attach(model, PLACES, method.start(model, PLACES, seed=0))
    assert inspect(attached, text, PLACES) == before


def test_no_text_is_an_error(tiny: Any) -> None:
    with pytest.raises(ValueError, match="none was given"):
        inspect(tiny(), [], PLACES)


@pytest.mark.slow
def test_honest_emulators_of_a_real_model_raise_no_suspicion() -> None:
    base, tokenizer = zoo.load_base(zoo.locate("smollm2-135m-instruct", cache=zoo.cache_folder()), torch.float32)
    paragraphs = (Path(__file__).parents[3] / "README.md").read_text().split("\n\n")
    examples = [TextExample("", paragraph) for paragraph in paragraphs if len(paragraph) > 100][:8]
    batches = evaluation_batches(encode(examples, tokenizer, max_length=64), batch_size=4)
    for name, settings in (("uniform", {}), ("crash", {}), ("crash", {"sharing": "on"}), ("uniform", {"keep": 12})):
        outline: Any = builder(name, {"keep": 24, **settings})
        outline = outline.outline(base, batches, Ends())
        found = inspect(restack(base, outline.layers, outline.shared), batches, outline.places)
        assert found.suspicions() == [], name
        assert min(found.change.values()) > 0.1 and max(found.likeness.values()) < 0.5
        assert min(found.context.values()) > 0.1
