"""The documents both ends agree on: what a person submits, what a site is asked to do, what it answers."""

from typing import Annotated, Any, Literal

from pydantic import Field

from offsite.protos.documents import document

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


@document
class Choice:
    """A plug-in by name and its settings; the family that owns it checks the settings."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


Chain = Annotated[tuple[Choice, ...], Field(min_length=1, max_length=4)]  # builders, in the order they work


@document
class TrainingSpec:
    """Local training of one round at one site, as it is asked for."""

    steps: Positive = 20  # optimiser steps
    batch_size: Positive = 4  # sequences per step, over all processes of the site
    learning_rate: Fraction | None = None  # None: what suits the method and the model
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clipping: Fraction = 1.0
    max_length: Positive = 256  # tokens of a sequence; longer ones are cut
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen weights; what trains is always fp32
    seed: Annotated[int, Field(ge=0)] = 0


@document
class LocalTraining(TrainingSpec):
    """Local training of one round at one site, with nothing left to choose."""

    learning_rate: Fraction


@document
class RunSpec:
    """One job of several rounds."""

    model: str  # at the coordinator: a path, a hub id or a name from the model zoo
    name: str = ""
    builders: Chain = (Choice(name="crash"),)
    trainable: Choice = Field(default_factory=lambda: Choice(name="ends"))  # which layers train
    method: Choice = Field(default_factory=lambda: Choice(name="lora"))
    strategy: Choice = Field(default_factory=lambda: Choice(name="low-rank"))
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    rounds: Positive = 1
    sites: tuple[Name, ...] = ()  # empty: every site that is enrolled when the run starts
    min_sites: Positive = 1  # fewer updates than this in a round fail the run
    stall_s: Fraction = 900.0  # a task that has got no further for this long is left out of the round
    public: str = ""  # at the coordinator: public text that builders may look at and tune on
    calibration: str = ""  # at the coordinator: text that builders look at instead, such as the task's; never tuned on
    realign_steps: Annotated[int, Field(ge=0)] = 0  # between rounds, of tuning the emulator beside the new adapter
    evaluation: dict[Name, str] = Field(default_factory=dict)  # at the coordinator: name -> held-out examples
    max_update_norm: Fraction = 1000.0  # L2 norm of an update's change since the broadcast; a larger one is refused
    max_update_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 5.0  # to the round's median, else left out
    evaluate_every: Annotated[int, Field(ge=0)] = 0  # rounds between plug-in figures; 0: only at the end
    merge: bool = False  # also publish the merged model


@document
class BaseRef:
    """The owner's full model, named but not shown."""

    name: str
    digest: str  # of its configuration and weight files
    layers: Positive
    parameters: Positive


@document
class FileEntry:
    """One file of a bundle."""

    path: str
    digest: str
    size: Annotated[int, Field(ge=0)]


@document
class Packing:
    """Which layers' linear maps are stored in a format of few bits."""

    format: Choice
    places: tuple[int, ...]


@document
class Manifest:
    """What is in a bundle. `layers[i]` is the base's layer at position i of the emulator."""

    format: Literal[1] = 1
    base: BaseRef
    builders: Chain
    layers: tuple[int, ...]
    trainable: tuple[int, ...]  # layer ids of the base
    shared: dict[int, int] = Field(default_factory=dict)  # position -> position whose parameters it has
    packed: Packing | None = None
    narrow: dict[int, dict[str, tuple[int, int]]] = Field(default_factory=dict)  # position -> map -> (d_out, d_in)
    parameters: Positive  # of the emulator, as it computes
    verbatim: Annotated[int, Field(ge=0)]  # parameters of the base that it holds as they are
    lossy: Annotated[int, Field(ge=0)]  # and those it holds in a format of few bits
    files: tuple[FileEntry, ...]


@document
class TaskSpec:
    """One round's work for one site; signed by the model owner."""

    run: str
    round: Annotated[int, Field(ge=0)]
    rounds: Positive
    site: Name
    attempt: Annotated[int, Field(ge=0)]
    base: str  # digest of the full model
    manifest: str  # digest of the bundle's manifest
    manifest_size: Positive
    adapter: str  # digest of the broadcast adapter
    adapter_size: Positive
    method: Choice
    method_hash: str  # digest of the base, the method and the layers it trains
    training: LocalTraining


@document
class Span:
    """A stretch of wall-clock time, in seconds since the epoch."""

    kind: Literal["loading", "training", "evaluation", "building", "aggregation", "download", "transfer"]
    start: Finite
    end: Finite


@document
class UpdateMetrics:
    """What a site tells beside its update; no text of its data."""

    examples: Positive  # distinct training examples seen, the update's weight
    tokens: Positive  # target tokens trained on
    losses: tuple[Finite, ...]  # mean loss of each step
    spans: Annotated[tuple[Span, ...], Field(max_length=16)] = ()
    engine: Annotated[str, Field(max_length=200)]
    peak_memory_bytes: Annotated[int, Field(ge=0)] = 0
