"""What a submitted run may ask for; judged before anything is trained."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Strategy
from offsite.coordinator.runs import pairs, quorum
from offsite.coordinator.runs.accumulation import judge_memory, judge_retention
from offsite.coordinator.runs.conditions import judge_gate, judge_patience
from offsite.coordinator.runs.continuing import Left, unlike
from offsite.coordinator.runs.fitting import judge_fit
from offsite.coordinator.runs.partial import part_of
from offsite.emulator import builders, methods, objectives, optimisers, placements, schedules, zoo
from offsite.emulator.builders.base import Realigner
from offsite.emulator.examples import Example
from offsite.emulator.methods import Method
from offsite.emulator.methods.base import Carrying, Measuring, takes
from offsite.emulator.modality import read
from offsite.emulator.outline import REDUCTION
from offsite.emulator.parts import Allotting
from offsite.kernels.schema import Tier
from offsite.protos import upload
from offsite.protos.documents import nearest
from offsite.protos.errors import InputError, RefusedError
from offsite.protos.ranges import AMOUNT
from offsite.protos.spec import OPTIMISER, PART, Choice, RunSpec, TrainingSpec


def judge(spec: RunSpec, *, folders: Sequence[str] = (), whole: bool = True) -> None:
    """Raise InputError with one sentence if the run cannot be done as it is written; links stay within the folders.

    Where an emulator may not be the `whole` base, one that would be raises RefusedError.
    """
    try:
        judge_patience(spec)
        checks = judge_gate(spec)
        method = methods.make(spec.method.name, spec.method.settings)
        if isinstance(method, Carrying) and not spec.start:
            raise ValueError(
                f"start: the method {method.name} measures at a version of the method {method.carries[0]}; name a run "
                "of that, on the same model and layers, as start"
            )
        if takes(method) and not spec.start:
            raise ValueError(
                f"start: the method {method.name} with these settings begins from the {takes(method)} that sites have "
                f"measured; run {' or '.join(pairs.measuring())} on the same model and layers, and name that as start"
            )
        _judge_emulator(spec, method, whole=whole)
        _judge_schedule(spec.training, rounds=spec.rounds)
        _judge_optimiser(spec.training)
        _judge_speed(spec, method)
        _judge_objective(spec)
        part_of(spec.training)
        if spec.merge and not method.mergeable:
            raise ValueError(
                f"merge: what {method.name} trains is no change of the base's weights, so that no model of the base's "
                "kind has it merged; leave merge out, and put the adapter that the run publishes beside the base "
                "(offsite.emulator.plug.load)"
            )
        if folder := zoo.look_up(spec.model, cache=zoo.cache_folder()):
            judge_fit(spec, folder)
        own = [spec.probes[name] for check in checks for name in check.texts]
        paths = {*spec.evaluation.values(), *own, spec.public, spec.calibration, spec.attack_text} - {""}
        texts = {path: read(Path(path), folders=[Path(folder) for folder in folders]) for path in sorted(paths)}
        _judge_attacks(spec, texts)
    except ValueError as error:
        raise InputError(str(error)) from error
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    if not method.rules <= strategy.rules:
        raise InputError(
            f"strategy {spec.strategy.name} cannot average method {spec.method.name}, whose tensors are to be averaged "
            f"by {', '.join(sorted(method.rules))}; use one of: {', '.join(pairs.strategies(method)) or 'none'}"
        )
    judge_memory(spec, method, strategy)
    _judge_upload(spec, method, strategy)
    _judge_part(spec, method, strategy)
    mixed = tiers(spec) or method.tiers()
    judge_retention(spec, method, strategy, tiers=mixed)
    if len(mixed) > 1 and not strategy.mixed_tiers:
        raise InputError(
            f"strategy {spec.strategy.name} needs sites of one tier, these have {', '.join(sorted(mixed))}; "
            f"use one of: {', '.join(pairs.strategies(method, mixed=True)) or 'none'}"
        )
    _judge_rounds(spec, method, strategy)
    if len(spec.sites) != len(set(spec.sites)):
        raise InputError(f"sites: a name stands twice in {list(spec.sites)}")
    if spec.sites and len(spec.sites) < spec.min_sites:
        raise InputError(f"min_sites is {spec.min_sites}, but only {len(spec.sites)} sites are named")


def _judge_attacks(spec: RunSpec, texts: Mapping[str, Sequence[Example]]) -> None:
    """Raise ValueError if the attacks asked for cannot be made, or would train on what they are measured on."""
    if not spec.attack_steps:
        if spec.attack_text:
            raise ValueError("attack_text is for attacks, and none is asked for: give attack_steps, or leave it out")
        return
    if not spec.evaluation:
        raise ValueError("attacks are measured on held-out examples: give some as evaluation, or set attack_steps to 0")
    places = {name: place for name in ("public", "attack_text") if (place := getattr(spec, name))}
    if not places:
        raise ValueError(
            "attacks train on public text or the task's: give some as public or attack_text, or set attack_steps to 0"
        )
    for name, place in places.items():
        if len(texts[place]) < 2:
            raise ValueError(
                f"{name}: an attack holds a tenth of its text back, and {place} has one example; give more"
            )
        trained = {_key(example) for example in texts[place]}
        for exam, path in sorted(spec.evaluation.items()):
            if both := sum(_key(example) in trained for example in texts[path]):
                raise ValueError(
                    f"{name}: {both} of the {len(texts[path])} held-out examples of {exam} are in {place}, and an "
                    "attack must not train on what it is measured on; take them out of one of the two"
                )


def _key(example: Example) -> str:
    return json.dumps(example.row, sort_keys=True, default=str)


def tiers(spec: RunSpec) -> frozenset[Tier]:
    """Return the tiers of the sites that a run names; none: it takes who is there."""
    method = methods.make(spec.method.name, spec.method.settings)
    return frozenset(method.tier_at(site) for site in spec.sites)


def leaves(spec: RunSpec) -> Left:
    """Return what a version of a run is of, as the next one goes on from it."""
    method = methods.make(spec.method.name, spec.method.settings)
    if not isinstance(method, Carrying):
        return Left(spec.method)
    name, settings = method.carries
    return Left(Choice(name=name, settings=dict(settings)), frozenset({method.gives}))


def beginning(spec: RunSpec) -> Callable[[RunSpec], str] | None:
    """Return what says why a run cannot begin from what the sites of another have measured; None if it does not ask."""
    own = methods.make(spec.method.name, spec.method.settings)
    taken = takes(own)

    def why(other: RunSpec) -> str:
        if isinstance(own, Carrying):
            left, its = leaves(other).method, other.strategy.name
            if why := unlike(left, leaves(spec).method):
                return why
            kind = methods.METHODS[left.name]
            if pairs.keeps_values(kind, aggregation.STRATEGIES[its]):
                return ""
            return (
                f"is of strategy {its}, which writes products in other factors after each round, so that what "
                f"{own.name} measures would be of values that mean nothing in the next; name a run of "
                f"{' or '.join(pairs.keeping(kind))}"
            )
        method = methods.make(other.method.name, other.method.settings)
        gives = method.gives if isinstance(method, Measuring) else "nothing"
        if gives == taken:
            return ""
        return (
            f"is of the method {method.name}, which measured {gives}, and this run begins from the {taken} that sites "
            f"have measured; name a run of {' or '.join(pairs.measuring())} that measured them"
        )

    return why if taken else None


def _judge_upload(spec: RunSpec, method: Method, strategy: Strategy) -> None:
    """Raise InputError if an upload's stages are not known, or ask more of a round than it does."""
    for stage in upload.make(spec.upload):
        why = ""
        if stage.hides and strategy.needs != "sum":
            summing = " or ".join(pairs.strategies(method, summing=True)) or "no such stage"
            why = f"hides all but a sum, and strategy {strategy.name} must see each update; use {summing}"
        elif stage.hides:
            why = "hides all but a sum, and rounds unpack each update by itself so far; leave it out"
        elif stage.phases != ("train",):
            why = f"works in the phases {', '.join(stage.phases)}, and a round has train alone so far; leave it out"
        if why:
            raise InputError(f"upload: stage {stage.name} {why}")


def _judge_part(spec: RunSpec, method: Method, strategy: Strategy) -> None:
    """Raise InputError for a part with which updates cannot be folded, or fed back, or steps not taken together."""
    part, stages = part_of(spec.training), upload.make(spec.upload)
    if part.partial and isinstance(method, Measuring):
        raise InputError(
            f"training.part: the method {method.name} measures, and nothing of it trains; use part {PART.name}"
        )
    if part.starts and not spec.start:
        raise InputError(
            f"training.part: {part.name} trains what does nothing without the rest, and this run begins anew, with the "
            f"rest untrained; name a run of the method {method.name} as start, or use part {PART.name}"
        )
    strange = sorted(part.sites.keys() - {*spec.sites}) if isinstance(part, Allotting) and spec.sites else []
    if strange:
        raise InputError(
            f"training.part: {part.name} says what site {strange[0]!r} trains, and the run has no such site; "
            f"{nearest(strange[0], sorted(spec.sites))}"
        )
    if not pairs.folds(strategy, part):
        raise InputError(
            f"training.part: strategy {strategy.name} folds all tensors together, and with part {part.name} an update "
            f"lacks some; use part {PART.name}, or one of: {', '.join(pairs.strategies(method, part=part)) or 'none'}"
        )
    optimiser = optimisers.make(spec.training.optimiser.name, spec.training.optimiser.settings)
    if optimiser.aligned and not part.alike:
        raise InputError(
            f"training.part: with the optimiser {optimiser.name} all sites move along the same directions, and with "
            f"part {part.name} as it is set each site trains another part; use one of the parts "
            f"{', '.join(pairs.alike(strategy))}, drawn once a round, or one of the optimisers "
            f"{', '.join(pairs.unaligned())}"
        )
    together, feeding = [one.name for one in stages if one.whole], [one.name for one in stages if one.feedback]
    if part.partial and together and feeding:
        raise InputError(
            f"training.part: with part {part.name} rounds pack other tensors, and what stage {feeding[0]} leaves out "
            f"of one cannot be added in another where stage {together[0]} packs all of them together; use part "
            f"{PART.name}, or leave one of the two stages out"
        )


def _judge_rounds(spec: RunSpec, method: Method, strategy: Strategy) -> None:
    """Raise InputError for rounds that cannot have the sites, or the quorum, that they are to have."""
    if spec.quorum and not spec.min_sites <= spec.quorum:
        raise InputError(
            f"quorum is {spec.quorum}: a round with fewer updates than min_sites, which is {spec.min_sites}, fails the "
            "run; ask for no less"
        )
    if spec.join and spec.sites:
        raise InputError("join: a run that names its sites has no others; leave one of the two out")
    if spec.spare and not spec.sites_per_round:
        raise InputError("spare: more sites than all cannot be drawn; give sites_per_round, or leave spare out")
    if 0 < spec.sites_per_round < (least := max(spec.min_sites, spec.quorum)):
        raise InputError(f"sites_per_round is {spec.sites_per_round}, and a round is to have at least {least} updates")
    if spec.sites and spec.quorum > len(spec.sites):
        raise InputError(f"quorum is {spec.quorum}, but only {len(spec.sites)} sites are named")
    if spec.staleness:
        _judge_late(spec, method, strategy)


def _judge_late(spec: RunSpec, method: Method, strategy: Strategy) -> None:
    """Raise InputError for late updates that there are none of, or that cannot be folded."""
    why = ""
    if quorum.of(spec) is None:
        why = "nobody is late where all are waited for; give a quorum, or leave staleness out"
    elif not strategy.linear:
        linear = ", ".join(pairs.strategies(method, linear=True)) or "no other for this method"
        why = (
            f"strategy {strategy.name} is no weighted sum of updates, and what an older broadcast has become cannot be "
            f"folded; use {linear}, or leave staleness out"
        )
    elif part_of(spec.training).partial:
        why = (
            f"part {spec.training.part.name} trains other tensors in each round; use part {PART.name}, or leave it out"
        )
    elif spec.contributions:
        why = "contributions are measured of rounds whose updates are their own; leave one of the two out"
    if why:
        raise InputError(f"staleness: {why}")


def _judge_schedule(training: TrainingSpec, *, rounds: int) -> None:
    """Raise ValueError if what the learning rate's schedule goes over is too short for it, or too long to count."""
    steps = training.steps * (rounds if training.span == "run" else 1)
    if steps > AMOUNT:
        raise ValueError(
            f"a schedule over a run of {steps} steps is too long; ask for fewer rounds, or a span of a round"
        )
    schedules.make(training.schedule.name, training.schedule.settings).fits(steps, training.warmup_steps)


def _judge_optimiser(training: TrainingSpec) -> None:
    """Raise ValueError if what takes the steps is not known, or no rate is known that suits it."""
    optimiser = optimisers.make(training.optimiser.name, training.optimiser.settings)
    if not optimiser.scale_free and training.learning_rate is None:
        raise ValueError(
            f"the rates of methods are those of adaptive optimisers, and the steps of {optimiser.name} are as long as "
            "the gradients that it estimates: give training.learning_rate, and a training.gradient_clipping that "
            "leaves such gradients as they are"
        )


def _judge_speed(spec: RunSpec, method: Method) -> None:
    """Raise ValueError if a rate is to be found by trial, and cannot or need not be."""
    if not spec.speed:
        return
    if isinstance(method, Measuring):
        raise ValueError(f"speed: the method {method.name} measures, and nothing of it trains; leave it out")
    if spec.training.learning_rate is not None:
        raise ValueError(
            "speed is what a learning rate is found by, and training.learning_rate is one; give one of both"
        )
    if spec.training.optimiser.name != OPTIMISER.name:
        raise ValueError(f"speed: the trial is by {OPTIMISER.name}; use that as training.optimiser, or leave speed out")
    if not spec.public:
        raise ValueError("speed: a trial trains on public text: give some as public, or leave speed out")


def _judge_objective(spec: RunSpec) -> None:
    """Raise ValueError if what training lessens is not known, or the base would be tuned on rows of another shape."""
    objective = objectives.make(spec.training.objective.name, spec.training.objective.settings)
    if objective.compares and spec.attack_text:
        raise ValueError(
            f"attack_text: the base is tuned on it as the sites tune the emulator, and the objective {objective.name} "
            "compares answers, which attacks cannot train on; leave it out, and attacks train on public text alone"
        )


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
            f"the method {method.name} trains {missing[0]}: put {builders.providers(missing[0])} among the builders, "
            f"or use one of the methods {', '.join(pairs.trainers(has))}"
        )
    if spec.realign_steps and not isinstance(chain[-1], Realigner):
        fitting = " or ".join(name for name, kind in builders.BUILDERS.items() if issubclass(kind, Realigner))
        raise ValueError(f"realign_steps goes on with what the last builder does: put {fitting} last in builders")
    if not whole and REDUCTION not in has:
        raise RefusedError(
            f"the owner's policy refuses the run (builders): without {builders.providers(REDUCTION)} an emulator is "
            "the whole base"
        )
