"""What a submitted run may ask for; judged before anything is trained."""

from collections.abc import Sequence
from pathlib import Path

from offsite.coordinator import aggregation
from offsite.coordinator.runs.fitting import judge_fit
from offsite.emulator import builders, methods, placements, zoo
from offsite.emulator.builders.base import Realigner
from offsite.emulator.examples import read
from offsite.emulator.methods import Method
from offsite.emulator.outline import REDUCTION
from offsite.protos.errors import InputError, RefusedError
from offsite.protos.spec import RunSpec


def judge(spec: RunSpec, *, folders: Sequence[str] = (), whole: bool = True) -> None:
    """Raise InputError with one sentence if the run cannot be done as it is written; links stay within the folders.

    Where an emulator may not be the `whole` base, one that would be raises RefusedError.
    """
    try:
        method = methods.make(spec.method.name, spec.method.settings)
        _judge_emulator(spec, method, whole=whole)
        if folder := zoo.look_up(spec.model, cache=zoo.cache_folder()):
            judge_fit(spec, folder)
        for path in filter(None, (*spec.evaluation.values(), spec.public, spec.calibration)):
            read(Path(path), folders=[Path(folder) for folder in folders])
    except ValueError as error:
        raise InputError(str(error)) from error
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    if method.kind not in strategy.kinds:
        fitting = sorted(name for name, other in aggregation.STRATEGIES.items() if method.kind in other.kinds)
        raise InputError(
            f"strategy {spec.strategy.name} cannot average method {spec.method.name} (kind {method.kind}); "
            f"use one of: {', '.join(fitting)}"
        )
    named = spec.sites or ("", *spec.method.settings.get("ranks", ()))  # "": any site that is not named
    ranks = {method.rank_at(site) for site in named}
    if len(ranks) > 1 and not strategy.mixed_ranks:
        raise InputError(
            f"strategy {spec.strategy.name} needs equal ranks, the sites have {sorted(ranks)}; use low-rank"
        )
    if len(spec.sites) != len(set(spec.sites)):
        raise InputError(f"sites: a name stands twice in {list(spec.sites)}")
    if spec.sites and len(spec.sites) < spec.min_sites:
        raise InputError(f"min_sites is {spec.min_sites}, but only {len(spec.sites)} sites are named")


def _judge_emulator(spec: RunSpec, method: Method, *, whole: bool) -> None:
    """Raise ValueError if its emulator cannot be built, or cannot be trained by its method."""
    chain = [builders.make(choice.name, choice.settings) for choice in spec.builders]
    builders.check(chain)
    placements.make(spec.trainable.name, spec.trainable.settings)
    names = [builder.name for builder in chain]
    for builder in chain:
        if builder.trains_on_text and not spec.public:
            raise ValueError(f"the builder {builder.name} tunes on public text: give some as public")
        if builder.looks_at_text and not (spec.public or spec.calibration):
            raise ValueError(
                f"the builder {builder.name} looks at how the model reads text: give some as public, or as calibration"
            )
    if spec.calibration and not any(builder.looks_at_text for builder in chain):
        raise ValueError(f"calibration is text to look at, and none of {', '.join(names)} does; leave it out")
    has = builders.provided(chain)
    if missing := sorted(method.needs - has):
        raise ValueError(
            f"the method {method.name} trains {missing[0]}: put {builders.providers(missing[0])} among the builders"
        )
    if spec.realign_steps and not isinstance(chain[-1], Realigner):
        fitting = " or ".join(name for name, kind in builders.BUILDERS.items() if issubclass(kind, Realigner))
        raise ValueError(f"realign_steps goes on with what the last builder does: put {fitting} last in builders")
    if not whole and REDUCTION not in has:
        raise RefusedError(
            f"the owner's policy refuses the run (builders): without {builders.providers(REDUCTION)} an emulator is "
            "the whole base"
        )
