"""Every method on models other than Llama's: what it promises on that, it does on others, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.emulator import builders
from offsite.emulator.builders import Material
from offsite.emulator.methods import METHODS, make
from offsite.emulator.placements import Ends
from offsite.emulator.plug import load, plug
from offsite.kernels.schema import groups, settle

FAMILIES = ("gpt2", "bert", "vit")
SAMPLE = {"lora", "bottleneck", "paca", "amt", "miss"}
CASES = [
    pytest.param(family, name, marks=[pytest.mark.slow] * (name not in SAMPLE))
    for family in FAMILIES
    for name, kind in sorted(METHODS.items())
    # Not what a builder gives that looks at how a model writes text, nor what does not train.
    if not kind.needs and not hasattr(kind, "measure")
]


def inputs(family: str) -> dict[str, Tensor]:
    """Return what a model of a family takes: images, or tokens."""
    draw = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(4, 1, 8, 8, generator=draw)}
    return {"input_ids": torch.randint(3, 96, (2, 14), generator=draw)}


def outputs(model: nn.Module, family: str) -> Tensor:
    logits: Tensor = model(**inputs(family)).logits
    return logits


def learn(model: nn.Module, live: dict[str, nn.Parameter], family: str) -> None:
    """Take two steps towards the first of what can be predicted."""
    optimizer = torch.optim.AdamW(live.values(), lr=0.05)
    for _ in range(2):
        loss = -outputs(model, family).log_softmax(-1)[..., 0].mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_method_begins_with_nothing_trains_all_it_names_and_comes_back_to_the_base(
    family: str, name: str, tiny: Any, tmp_path: Path
) -> None:
    method = make(name, {})
    base = tiny(family, layers=4)
    draft = builders.run([builders.make("whole", {})], Ends(1, 1), base, Material(batches=[]))
    places = draft.outline.places
    try:
        method.fits(draft.model, places)
    except ValueError as error:  # of maps that GPT-2 stores the other way round
        assert family == "gpt2" and "Conv1D" in str(error)
        return
    start = method.start(draft.model, places, seed=0)
    with torch.no_grad():
        before = outputs(draft.model, family)
        model = method.attach(draft.model, places, start)
        torch.testing.assert_close(outputs(model, family), before)
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    live = method.named_parameters(model, places)
    trained = {id(parameter) for parameter in live.values()}
    names = {key for key, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in trained}
    learn(model, live, family)
    assert all(torch.equal(value, frozen[key]) for key, value in model.state_dict().items() if key not in names)
    adapter = method.state(model, places)
    schema = settle(method.schema(start), {key: tensor.shape for key, tensor in start.items()})
    moving = {key for key, field in schema.items() if field.trained}
    of = {key: groups(schema)[schema[key].group or key] if schema[key].bits else [key] for key in moving}
    assert moving == live.keys()
    assert not [key for key in moving if all(torch.equal(adapter[one], start[one]) for one in of[key])]

    recovered = method.recover(adapter, draft.recovery)
    method.export(tmp_path / "out", recovered, base=base, base_name="base")
    with torch.no_grad():
        after = outputs(model.eval(), family)
        assert not torch.allclose(after, before)
        beside = outputs(plug(tiny(family, layers=4), method, recovered), family)
        torch.testing.assert_close(beside, after, rtol=1e-4, atol=1e-4)
        if method.mergeable:
            method.merge(base, recovered)
            torch.testing.assert_close(outputs(base, family), after, rtol=1e-4, atol=1e-4)
        if method.attaches:
            loaded = outputs(load(tiny(family, layers=4), tmp_path / "out"), family)
            torch.testing.assert_close(loaded, beside)
