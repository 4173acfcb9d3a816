"""What a run asks of its model, held against the model's own shapes when it is submitted: no weight is read."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from offsite.coordinator.runs import pairs
from offsite.coordinator.runs.partial import part_of
from offsite.emulator import builders, methods, placements, zoo
from offsite.emulator.anatomy.stack import refuse_mixture, restack
from offsite.emulator.anatomy.structure import layers, positions
from offsite.emulator.builders.base import evenly
from offsite.emulator.methods import Method
from offsite.emulator.outline import Outline
from offsite.kernels.schema import settle
from offsite.protos import upload
from offsite.protos.spec import RunSpec

_OF_VALUES = (DataDependentOutputException, DynamicOutputShapeException)  # what asks for values where none has any


def judge_fit(spec: RunSpec, folder: Path) -> None:
    """Raise ValueError if a model cannot be the base of a run.

    The folder has at least its configuration; what it has of weights and of a tokenizer is looked at too.
    """
    model = zoo.survey(folder)
    if (folder / "tokenizer_config.json").is_file():
        zoo.refuse_strange_words(folder, zoo.load_tokenizer(folder), model)
    most, length = positions(model), spec.training.max_length
    if most is not None and length > most:
        raise ValueError(
            f"training.max_length is {length}, but {folder.name} has positions for {most} tokens; ask for at most that"
        )
    outline = _outline(spec, model)
    own = [outline.layers[place] for place in outline.own]
    refuse_mixture(model, own)
    emulator = restack(model, outline.layers, outline.shared)
    method = methods.make(spec.method.name, spec.method.settings)
    chain: list[Any] = [builders.make(choice.name, choice.settings) for choice in spec.builders]
    for builder in chain:
        if builder.stage != "depth":
            places = builder.fits(emulator, outline, depth=len(layers(model)))
            altered = sorted(outline.layers[place] for place in places if place in outline.places)
            if altered and (unfit := sorted(method.spares & builder.alters)):
                others = pairs.trainers(builders.provided(chain), builder.alters)
                raise ValueError(
                    f"the method {method.name} cannot train layers that are {unfit[0]}, as the builder {builder.name} "
                    f"leaves layers {', '.join(map(str, altered))}; have it leave those that train as they are, or use "
                    f"one of the methods {', '.join(others) or 'none'}"
                )
    method.fits(emulator, outline.places)
    _judge_update(spec, method, emulator, outline.places)


def _judge_update(spec: RunSpec, method: Method, model: Any, places: Mapping[int, int]) -> None:
    """Raise ValueError if a round cannot train a part of some tier's adapter, or a stage not pack what a site sends.

    It is judged by the shapes of the base.

    What only the built emulator has, or only values tell, is judged when it is built: what a method needs of builders,
    maps that these narrow, and schemas that depend on the start's values.
    """
    stages, part = upload.make(spec.upload), part_of(spec.training)
    if not (stages or part.partial) or method.needs:
        return
    for tier in sorted({method.tier_at(site) for site in spec.sites} or method.tiers()):
        with FakeTensorMode(allow_non_fake_inputs=True), suppress(*_OF_VALUES):
            start = method.start(model, places, seed=spec.training.seed, tier=tier)
            schema = settle(method.schema(start), {name: tensor.shape for name, tensor in start.items()})
            try:
                part.fits(schema)
            except ValueError as error:
                raise ValueError(f"training.part: {error}") from error
            try:
                upload.schema_of(stages, schema)
            except ValueError as error:
                raise ValueError(f"upload: {error}") from error


def _outline(spec: RunSpec, model: Any) -> Outline:
    """Return an outline of as many layers as the run's will have; which they are may be decided by text."""
    placement = placements.make(spec.trainable.name, spec.trainable.settings)
    chain = [builders.make(choice.name, choice.settings) for choice in spec.builders]
    depth = len(layers(model))
    return evenly(depth, builders.first(chain).kept(depth), placement)
