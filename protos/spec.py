"""The documents both ends agree on: what a person submits, what a site is asked to do, what it answers."""

from typing import Annotated, Literal

from pydantic import Field

from offsite.protos.documents import Stated, Written, document, parse
from offsite.protos.errors import InputError
from offsite.protos.exams import Exam
from offsite.protos.grammar import TEXT, read_one
from offsite.protos.ranges import (
    LARGEST,
    AboveZero,
    Amount,
    AtLeastZero,
    Count,
    Digest,
    Finite,
    Flag,
    Line,
    Moment,
    Name,
    Place,
    Positive,
    Seed,
    Settings,
    Start,
    Task,
    Tier,
    Word,
)

DEPTHS = 10_000  # layers of a model, at most
LINKS = 4  # of a chain of plug-ins
EXAMS = 500_000  # what the round of a task that only measures is counted from: it is of the version with this number
Layers = Annotated[tuple[Count, ...], Field(max_length=DEPTHS)]
Shared = Annotated[dict[Count, Count], Field(max_length=DEPTHS)]
Names = Annotated[tuple[Name, ...], Field(max_length=1024)]
Exams = Annotated[dict[Name, Place], Field(max_length=256)]
Ratio = Annotated[float, Field(strict=True, gt=1, le=LARGEST, allow_inf_nan=False)]
Links = Annotated[dict[Count, Finite], Field(max_length=DEPTHS)]
Shape = tuple[Positive, Positive]  # d_out, d_in
Narrow = Annotated[dict[Count, Annotated[dict[Word, Shape], Field(max_length=256)]], Field(max_length=DEPTHS)]


@document
class Choice:
    """A plug-in by name and its settings; the family that owns it checks the settings."""

    name: Word
    settings: Settings = Field(default_factory=dict)


def _chain(text: str) -> tuple[Choice, ...]:
    try:
        plain = [{"name": name, "settings": settings} for name, settings in read_one(text)]
        chain = tuple(parse(Choice, choice, where="recipe") for choice in plain)
    except InputError as error:
        raise ValueError(str(error)) from None
    if len(chain) > LINKS:
        raise ValueError(f"expected at most {LINKS} choices, got {len(chain)}")
    return chain


def _choice(text: str) -> Choice:
    chosen, *more = _chain(text)
    if more:
        raise ValueError(f"expected one choice, got {1 + len(more)}")
    return chosen


# Builders, in the order they work. A chain, and a choice of a run, can also be written as a recipe.
Chain = Annotated[tuple[Choice, ...], Field(min_length=1, max_length=LINKS), Stated(), Written(_chain, most=TEXT)]
Chosen = Annotated[Choice, Stated(), Written(_choice, most=TEXT)]
# Of an upload, in the order they pack it.
Stages = Annotated[tuple[Choice, ...], Field(max_length=LINKS), Stated(), Written(_chain, most=TEXT)]

# Of a gate; an owner's own, and the run's.
Checks = Annotated[tuple[Choice, ...], Field(max_length=2 * LINKS), Written(_chain, most=TEXT)]

# The plug-ins of a run that names no others.
BUILDERS = (Choice(name="crash"),)
TRAINABLE, METHOD, STRATEGY = Choice(name="ends"), Choice(name="lora"), Choice(name="low-rank")
SCHEDULE, OPTIMISER = Choice(name="constant"), Choice(name="adamw")
OBJECTIVE, PART = Choice(name="supervised"), Choice(name="all")
MEMORY = Choice(name="none")
RETENTION = Choice(name="none")


@document
class TrainingSpec:
    """Local training of one round at one site, as it is asked for."""

    steps: Positive = 20  # optimiser steps
    batch_size: Positive = 4  # sequences per step, over all processes of the site
    learning_rate: AboveZero | None = None  # None: what suits the method and the model
    warmup_steps: Count = 0  # over which the rate rises, before the first step at the whole rate
    schedule: Chosen = SCHEDULE  # how the rate goes on after the warm-up
    span: Literal["round", "run"] = "round"  # what warm-up and schedule go over: each round anew, or all rounds
    optimiser: Chosen = OPTIMISER  # what takes the steps
    objective: Chosen = OBJECTIVE  # what the steps lessen, and so what rows a site needs
    part: Chosen = PART  # what of the adapter trains in a round, and leaves the site
    retention: Chosen = RETENTION  # what a site does so as not to forget what earlier runs have learned
    weight_decay: AtLeastZero = 0.0  # of what trains, at each step
    gradient_clipping: AboveZero = 1.0  # a longer gradient is shortened to this L2 norm
    max_length: Positive = 256  # tokens of a sequence; longer ones are cut
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen weights; what trains is always fp32
    seed: Seed = 0  # of the order of the rows, and of the adapter's first values


@document
class LocalTraining(TrainingSpec):
    """Local training of one round at one site, with nothing left to choose."""

    learning_rate: AboveZero
    before: Amount = 0  # steps of earlier rounds, where the schedule goes over the run
    after: Amount = 0  # and of later ones


@document
class RunSpec:
    """One job of several rounds."""

    model: Place  # at the coordinator: a path, a hub id or a name from the model zoo
    name: Line = ""  # what lists call the run; empty: its id alone
    builders: Chain = BUILDERS  # how the emulator is made of the model, one after the other
    trainable: Chosen = TRAINABLE  # which of the emulator's layers train
    method: Chosen = METHOD  # what trains in them
    strategy: Chosen = STRATEGY  # how the sites' updates become one
    upload: Stages = ()  # what an update goes through before it leaves its site; empty: nothing
    training: TrainingSpec = Field(default_factory=TrainingSpec)  # what a site does in a round
    rounds: Positive = 1  # in each, sites train and their updates become one
    sites: Names = ()  # that take part; empty: every one that is enrolled when the run starts
    join: Flag = False  # sites that enrol after the start take part, too, each from the next round on
    sites_per_round: Count = 0  # drawn anew for each round; 0: all
    spare: AtLeastZero = 0.0  # share more that are drawn: a round closes once sites_per_round have given their updates
    min_sites: Positive = 1  # fewer updates than this in a round fail the run
    quorum: Count = 0  # updates after which a round waits for the others only for a grace; 0: for all of them
    grace: AtLeastZero = 0.25  # times as long as the quorum took, that a round waits for the others
    staleness: Count = 0  # rounds that an update may come late and still be folded, at less weight; 0: it is dropped
    priority: Count = 0  # of its tasks at a site that has some of several runs: the highest is done first
    wait_s: AboveZero = 86_400.0  # a run whose sites are not there after this long has failed
    stall_s: AboveZero = 900.0  # a task that has got no further for this long is left out of the round
    task_s: AboveZero = 86_400.0  # a site that is not done this long after it took its task is left out of the round
    public: Place = ""  # at the coordinator: public text that builders may look at and tune on
    calibration: Place = ""  # at the coordinator: text to look at instead, such as the task's; never tuned on
    speed: AtLeastZero = 0.0  # nats by which a trial on public text moves what is predicted, at the rate; 0: no trial
    realign_steps: Count = 0  # between rounds, of tuning the emulator beside the new adapter
    evaluation: Exams = Field(default_factory=dict)  # at the coordinator: name -> held-out examples
    exam: Literal["sites", "none"] = "sites"  # who else measures: each site, on rows that it holds out and never sends
    attack_steps: Count = 0  # of attacks on the emulator, as many as sites tune for in all; 0: it is not attacked
    attack_longest: Positive = 4  # the longest attacks take so many times the steps
    attack_text: Place = ""  # at the coordinator: examples of the task for attacks, and the base itself, to train on
    max_update_norm: AboveZero = 1000.0  # L2 norm of an update's change since the broadcast; a larger one is refused
    max_update_ratio: Ratio = 5.0  # to the round's median change; an update of more is left out
    evaluate_every: Count = 0  # rounds between plug-in figures; 0: only at the end, or each with a patience
    patience: Count = 0  # rounds without a gain after which the run stops; 0: it never does
    least_gain: AtLeastZero = 0.0  # nats a token by which a version has to be better than the best for a gain
    contributions: Flag = False  # also measure what each update gave: its cosine with the mean, the plug-in without it
    merge: Flag = False  # also publish the merged model
    gate: Checks = ()  # what must hold of the outcome, or nothing of the run is published
    probes: Exams = Field(default_factory=dict)  # at the coordinator: name -> texts that the gate's checks read
    start: Start = ""  # RUN, or RUN:ROUND counted from one: the version to go on from; empty: what changes nothing
    task: Task = ""  # what the run learns, by a name of its own; empty: it has none
    known_by: Start = ""  # RUN, or RUN:ROUND, that measured what this task's rows are like; empty: it goes by its name
    memory: Chosen = MEMORY  # how versions accumulate over rounds, and over the runs that go on from one another


@document
class Ancestor:
    """The version that a run goes on from."""

    run: Name
    round: Positive  # that ended in it, counted from one
    rounds: Positive  # that led to it, with those of the runs that this one went on from


@document
class BaseRef:
    """The owner's full model, named but not shown."""

    name: Place
    digest: Digest  # of its configuration and weight files
    layers: Positive
    parameters: Amount


@document
class FileEntry:
    """One file of a bundle."""

    path: Place
    digest: Digest
    size: Amount


@document
class Packing:
    """Which layers' linear maps are stored in a format of few bits."""

    format: Choice
    places: Layers


@document
class Grounds:
    """On what an emulator's layers were chosen: how alike they are, and how near another choice was."""

    links: Links  # layer -> CKA of its output with that of the next layer that may go
    gap: Finite | None  # log of the ratio of 1 - CKA of what was told apart; None: there was nothing to choose
    margin: Finite  # a gap below it did not decide by itself
    ways: Positive  # to choose within it; of several the calibration text decided
    lead: Finite | None  # nats a token by which it found the best better than the next


@document
class Manifest:
    """What is in a bundle. `layers[i]` is the base's layer at position i of the emulator."""

    format: Literal[1] = 1
    base: BaseRef
    builders: Chain
    layers: Layers
    trainable: Layers  # layer ids of the base
    shared: Shared = Field(default_factory=dict)  # position -> position whose parameters it has
    packed: Packing | None = None
    narrow: Narrow = Field(default_factory=dict)  # position -> map -> (d_out, d_in)
    grounds: Grounds | None = None  # where layers were compared
    parameters: Amount  # of the emulator, as it computes
    verbatim: Amount  # parameters of the base that it holds as they are
    lossy: Amount  # and those it holds in a format of few bits
    experts: Count = 0  # parameters of experts that are one tensor: never in few bits, and LoRA does not train them
    files: Annotated[tuple[FileEntry, ...], Field(max_length=10_000)]


@document
class TaskSpec:
    """One round's work for one site; signed by the model owner."""

    run: Name
    round: Count
    rounds: Positive
    site: Name
    attempt: Count
    base: Digest  # digest of the full model
    manifest: Digest  # digest of the bundle's manifest
    manifest_size: Amount
    adapter: Digest  # digest of the broadcast adapter
    adapter_size: Amount
    method: Choice
    method_hash: Digest  # digest of the base, the method and the layers it trains
    tier: Tier = ""  # what of the method's adapter this site trains, as the method says it
    training: LocalTraining
    upload: Stages = ()  # what the update goes through before it leaves the site
    previous: Digest | None = None  # the run's newest update of this site, where stages feed back what they left out
    update_size: Amount  # bytes of the tensors that leave
    continues: Ancestor | None = None  # what the run goes on from; None: from what the method and the seed give
    anchor: Digest | None = None  # digest of what the retention holds training to, beside the broadcast
    anchor_size: Amount = 0
    exam: Flag = False  # whether the site is to measure what it receives and what it makes of it on rows it holds out

    @property
    def examines(self) -> int:
        """Number of the version that is only to be measured, from 1; 0: it is to be trained."""
        return max(0, self.round - EXAMS)

    @property
    def number(self) -> int:
        """The round that it is of, or whose version it measures, counted from one."""
        return self.examines or self.round + 1

    @property
    def rounds_before(self) -> int:
        """Rounds that led to the version that the run goes on from."""
        return self.continues.rounds if self.continues else 0


@document
class Span:
    """A stretch of wall-clock time, in seconds since the epoch."""

    kind: Literal["loading", "training", "evaluation", "building", "aggregation", "download", "transfer"]
    start: Moment
    end: Moment

    def __post_init__(self) -> None:
        """Refuse a stretch that ends before it begins."""
        if self.end < self.start:
            raise ValueError("a span must not end before it begins")


@document
class UpdateMetrics:
    """What a site tells beside its update; no text of its data."""

    examples: Positive  # distinct training examples seen, the update's weight
    tokens: Annotated[Amount, Field(ge=1)]  # target tokens trained on
    loss: Finite  # mean over these tokens, each before its step; of another objective, over what it compares
    # Mean loss of each step, where the site's policy lets it out.
    losses: Annotated[tuple[Finite, ...], Field(max_length=100_000)] = ()
    spans: Annotated[tuple[Span, ...], Field(max_length=16)] = ()
    engine: Line
    chosen: Layers = ()  # what of the adapter trained, where the task's part has the site choose
    peak_memory_bytes: Amount = 0
    exam: Exam | None = None  # where the task asks for it, and the site's policy lets it out
