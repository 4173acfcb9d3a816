"""What every builder owes, by itself or on top of the builder it needs, run over the family's own mapping.

Another package's builder is held to it on its defaults, and so must have some that suit a model of six layers.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.emulator import builders, bundle, methods
from offsite.emulator.anatomy.structure import find, layers
from offsite.emulator.builders import BUILDERS, Material, Separable
from offsite.emulator.modality import Batch, encode
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Ends
from offsite.emulator.tuning.loop import Schedule, tune

CHAINS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "additive": [("additive", {"group": 4, "bits": 4, "steps": 1})],
    "crash": [("crash", {"keep": 4, "sharing": "on"})],
    "distilled": [("uniform", {"keep": 4}), ("distilled", {"steps": 2})],
    "loram": [("loram", {"mlp": 0.25, "first": 1, "last": 1})],
    "quantised": [("crash", {"keep": 4}), ("quantised", {"block": 16})],
    "sketch": [("sketch", {"layers": "frozen"})],
    "uniform": [("uniform", {"keep": 4})],
    "whole": [("whole", {})],
}
OTHER_FAMILIES = ("qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "opt", "bloom", "gpt_neox")


@pytest.fixture
def material(text: list[Batch], tokenizer: Any) -> Material:
    drawn = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(1)).tolist()
    examples = [TextExample("", " ".join(f"w{word}" for word in row)) for row in drawn]
    return Material(batches=text, samples=encode(examples, tokenizer, max_length=24))


def built(name: str, base: Any, material: Material) -> Draft:
    chain = [builders.make(step, settings) for step, settings in CHAINS.get(name) or foreign(name)]
    return builders.run(chain, Ends(1, 1), base, material)


def foreign(name: str) -> list[tuple[str, dict[str, Any]]]:
    """A chain with a builder of another package, after those that give it what it needs."""
    before = [CHAINS[builders.providers(need).split()[0]][-1] for need in sorted(BUILDERS[name].needs)]
    return [*before, (name, {})]


def digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model: Any, before: dict[str, torch.Tensor], *, but: set[str] = frozenset()) -> bool:  # type: ignore[assignment]
    return all(name in but or torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, family) for name in sorted(BUILDERS) for family in ("llama", "gpt2")),
        *(("quantised", family) for family in OTHER_FAMILIES),
    ],
)
def test_an_emulator_is_repeatable_travels_whole_and_trains_nothing_but_its_adapter(
    name: str, family: str, tiny: Any, tokenizer: Any, material: Material, ids: torch.Tensor, tmp_path: Path
) -> None:
    base = tiny(family)
    original = snapshot(base)
    draft = built(name, base, material)
    assert same(base, original), "building left the base as it was"

    bundle.save(draft.model, tokenizer, tmp_path / "one", outline=draft.outline)
    again = built(name, tiny(family), material)
    bundle.save(again.model, tokenizer, tmp_path / "two", outline=again.outline)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")

    emulator, _ = bundle.load(tmp_path / "one", layout=bundle.layout_of(draft), dtype="auto")
    with torch.no_grad():
        assert torch.equal(emulator(ids).logits, draft.model(ids).logits)
    assert len(layers(emulator)) == len(draft.outline.layers)

    method, places = methods.make("lora", {"rank": 2}), draft.outline.places
    frozen = snapshot(emulator)
    model = method.attach(emulator, places, method.start(emulator, places, seed=0))
    parameters = method.named_parameters(model, places)
    tune(model, parameters, material.samples, Schedule(2, 0.05))
    left = {
        key.replace(".base_layer", "").removeprefix("base_model.model."): t for key, t in model.state_dict().items()
    }
    assert all(torch.equal(left[key], tensor) for key, tensor in frozen.items() if key in left)
    assert frozen.keys() <= left.keys()

    method.merge(base, method.recover(method.state(model, places), draft.recovery))
    path = find(base).path
    changed = {key for key, tensor in base.state_dict().items() if not torch.equal(tensor, original[key])}
    assert changed and {key.removeprefix(f"{path}.").split(".")[0] for key in changed} == {"0", "5"}


@pytest.mark.parametrize("name", [name for name in sorted(BUILDERS) if issubclass(BUILDERS[name], Separable)])
def test_what_encodes_places_by_themselves_gives_the_same_for_whichever_are_encoded_together(
    name: str, tiny: Any, tokenizer: Any, material: Material, tmp_path: Path
) -> None:
    chain = [builders.make(step, settings) for step, settings in CHAINS.get(name) or foreign(name)]
    whole = builders.run(chain, Ends(1, 1), tiny("gpt2"), material)
    last: Any = builders.separable(chain)
    draft = builders.outlined(tiny("gpt2"), whole.outline)
    weights, encoded = last.look(draft, material), {}
    for place in reversed(last.places(draft.outline)):
        encoded |= last.encode(draft, [place], weights, Material())
    apart = last.finish(draft, dict(sorted(encoded.items())), material)
    for draft, folder in ((whole, "whole"), (apart, "apart")):
        bundle.save(draft.model, tokenizer, tmp_path / folder, outline=draft.outline)
    assert digest(tmp_path / "whole") == digest(tmp_path / "apart")
    assert whole.recovery.keys() == apart.recovery.keys()
    assert all(torch.equal(whole.recovery[name], apart.recovery[name]) for name in whole.recovery)


@pytest.mark.parametrize(
    ("chain", "fault"),
    [
        (["quantised", "crash"], "crash cannot follow quantised: builders come in the order depth"),
        (["crash", "uniform"], "uniform cannot follow crash"),
        (["crash", "quantised", "sketch"], "sketch cannot follow quantised"),
        (["crash", "quantised", "distilled"], "distilled cannot follow quantised"),
        (["whole", "distilled"], "distilled needs reduction: put crash or loram or uniform before it"),
        ([], "an emulator needs a builder; there are additive, crash"),
    ],
)
def test_builders_that_do_not_follow_one_another_say_why(chain: list[str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        builders.check([builders.make(name, {}) for name in chain])
