from pathlib import Path

import pytest
import torch
from torch import nn

from offsite.client.demo import data
from offsite.emulator import modality, zoo
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.builders import Material, run
from offsite.emulator.builders.crash import Crash
from offsite.emulator.builders.distilled import Distilled
from offsite.emulator.methods.lora import Lora
from offsite.emulator.modality import Batch, encode, read
from offsite.emulator.modality.causal_text.encoding import Tokens
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Ends
from offsite.emulator.precision import DTYPES, fastest
from offsite.emulator.tuning.loop import Schedule, tune

LORA = Lora()


def plugged_in(draft: Draft, private: list[Tokens]) -> nn.Module:
    """The base with the adapter that was trained on the emulator."""
    places = draft.outline.places
    start = LORA.start(draft.model, places, seed=0)
    student = LORA.attach(restack(draft.model, range(len(draft.outline.layers))), places, start)
    tune(student, LORA.named_parameters(student, places), private, Schedule(12, 1e-3, batch_size=4))
    trained = LORA.state(student, places)
    return LORA.attach(restack(draft.base, range(30)), {layer: layer for layer in places.values()}, trained)


@pytest.mark.long
@pytest.mark.slow
def test_distilling_20_of_30_layers_halves_the_emulators_perplexity_and_helps_the_plug_in(tmp_path: Path) -> None:
    """An eighth of the budget of 200 steps does."""
    cache = zoo.cache_folder()
    base, tokenizer = zoo.load_base(
        zoo.locate("smollm2-135m-instruct", cache=cache), DTYPES[fastest(torch.device("cpu"))]
    )
    sites = data.prepare(tmp_path, cache=cache, examples=24, held_out=8, seed=0, exam=True)

    def encoded(*files: Path) -> list[Tokens]:
        return encode([example for file in files for example in read(file)], tokenizer, max_length=96, divide=False)

    def perplexity(model: nn.Module, text: list[Batch]) -> float:
        return modality.score(model, text).perplexity

    public = encoded(tmp_path / "owner" / "public.jsonl")
    private = encoded(*(site.train for site in sites))
    unseen = evaluation_batches(public[112:], batch_size=8)
    exam = evaluation_batches(encoded(*(site.held_out for site in sites)), batch_size=8)
    material = Material(batches=evaluation_batches(public[:32], batch_size=8), samples=public[:112])
    dropped = run([Crash(keep=20)], Ends(2, 2), base, material)
    distilled = Distilled(steps=25, warmup_steps=5).change(dropped, material)
    zero_shot = perplexity(base, exam)
    for text, bound in ((unseen, perplexity(base, unseen)), (exam, zero_shot)):
        assert bound < perplexity(distilled.model, text) < 0.5 * perplexity(dropped.model, text)
    plain, better = (perplexity(plugged_in(draft, private), exam) for draft in (dropped, distilled))
    assert better < plain
    assert better < zero_shot
