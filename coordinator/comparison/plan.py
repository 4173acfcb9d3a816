"""What is to be compared, and whether it can be: judged before anything is built."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from offsite.coordinator.comparison.rows import Candidate
from offsite.emulator import builders, methods, placements
from offsite.emulator.evaluation.attack import LONGEST
from offsite.protos.documents import document, to_plain
from offsite.protos.errors import InputError
from offsite.protos.ranges import AboveZero, Place, Positive, Word
from offsite.protos.recipes import gather, render
from offsite.protos.spec import Choice, TrainingSpec


@document
class Plan:
    """A comparison; texts are paths of examples."""

    model: Place
    candidates: Annotated[tuple[Candidate, ...], Field(max_length=4096)]
    train: Place  # what a site would have
    held_out: Place  # the same kind of text, to measure on
    public: Place  # for builders that look at text, and for the attack that heals
    calibration: Place = ""  # for builders to look at, such as the task's; empty: the public text
    general: Place = ""  # to measure general ability on; empty: the second half of the public text
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    learning_rate: AboveZero | None = None  # of tuning; None: what suits each method and the model
    attack_steps: Positive  # as many as the tuning's
    attack_longest: Positive = LONGEST  # times as many in the longest attacks
    attack_learning_rate: AboveZero | None = None  # None: what suits whole layers of the model
    protected_from: AboveZero | None = None  # nats
    tasks: Annotated[tuple[Word, ...], Field(max_length=64)] = ()  # of lm-eval
    limit: Positive | None = None  # questions of a task

    @property
    def settings(self) -> dict[str, Any]:
        """What all candidates have in common, as plain data."""
        plain: dict[str, Any] = to_plain(self)
        del plain["training"]["learning_rate"]  # the plan's own says it
        return {name: value for name, value in plain.items() if name not in ("model", "candidates")}


def cross(grids: Sequence[str], placed: Sequence[str], trained: Sequence[str]) -> tuple[Candidate, ...]:
    """Return every legal combination of recipes of builders, of what trains, and of methods.

    A chain goes with the methods that fit it. Raises InputError on a recipe that cannot be read, names something
    unknown or cannot be built, and on one that fits nothing it was given with.
    """
    chains, places, ways = gather(grids), _ones(placed), _ones(trained)
    for chain in chains:
        _check_chain(chain)
    for choice in places:
        _made(placements.make, choice)
    for choice in ways:
        _made(methods.make, choice)
    pairs = [(chain, method) for chain in chains for method in ways if fits(chain, method)]
    for chain in chains:
        if not any(chain == paired for paired, _ in pairs):
            raise InputError(
                f"{render(chain)} goes with none of the methods {', '.join(render([way]) for way in ways)}, "
                "which train what it does not build"
            )
    for way in ways:
        if not any(way == paired for _, paired in pairs):
            raise InputError(f"{render([way])} goes with none of the chains: it trains what none of them builds")
    return tuple(
        Candidate(builders=chain, trainable=place, method=way)
        for chain in chains
        for place in places
        for way in ways
        if (chain, way) in pairs
    )


def fits(chain: Sequence[Choice], method: Choice) -> bool:
    """Tell whether a method trains what a chain builds."""
    way = methods.make(method.name, method.settings)
    return way.needs <= builders.provided([builders.make(choice.name, choice.settings) for choice in chain])


def _ones(texts: Sequence[str]) -> list[Choice]:
    choices: list[Choice] = []
    for chain in gather(texts):
        if len(chain) != 1:
            raise InputError(f"{render(chain)}: expected one choice, found {len(chain)}; give several one by one")
        choices += chain
    return choices


def _check_chain(chain: Sequence[Choice]) -> None:
    try:
        builders.check([builders.make(choice.name, choice.settings) for choice in chain])
    except ValueError as error:
        raise InputError(f"{render(chain)}: {error}") from None


def _made(make: Any, choice: Choice) -> None:
    try:
        make(choice.name, choice.settings)
    except ValueError as error:
        raise InputError(f"{render([choice])}: {error}") from None
