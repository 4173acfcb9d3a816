"""What a run asks of its model, held against the model's own shapes when it is submitted: no weight is read."""

from pathlib import Path
from typing import Any

from offsite.emulator import builders, methods, placements, zoo
from offsite.emulator.anatomy.stack import refuse_mixture, restack
from offsite.emulator.anatomy.structure import layers, positions
from offsite.emulator.builders.base import evenly
from offsite.emulator.outline import Outline
from offsite.protos.spec import RunSpec


def judge_fit(spec: RunSpec, folder: Path) -> None:
    """Raise ValueError if a model cannot be the base of a run.

    The folder has at least its configuration; what it has of weights and of a tokenizer is looked at too.
    """
    model = zoo.survey(folder)
    if (folder / "tokenizer_config.json").is_file():
        zoo.refuse_strange_words(folder, zoo.load_tokenizer(folder), model)
    most, asked = positions(model), spec.training.max_length
    if most is not None and asked > most:
        raise ValueError(
            f"training.max_length is {asked}, but {folder.name} has positions for {most} tokens; ask for at most that"
        )
    outline = _outline(spec, model)
    own = [outline.layers[place] for place in outline.own]
    refuse_mixture(model, own)
    emulator = restack(model, outline.layers, outline.shared)
    for choice in spec.builders:
        builder: Any = builders.make(choice.name, choice.settings)
        if builder.stage != "depth":
            builder.fits(emulator, outline, depth=len(layers(model)))
    methods.make(spec.method.name, spec.method.settings).fits(emulator, outline.places)


def _outline(spec: RunSpec, model: Any) -> Outline:
    """Return an outline of as many layers as the run's will have; which they are may be decided by text."""
    placement = placements.make(spec.trainable.name, spec.trainable.settings)
    chain = [builders.make(choice.name, choice.settings) for choice in spec.builders]
    depth = len(layers(model))
    return evenly(depth, builders.first(chain).kept(depth), placement)
