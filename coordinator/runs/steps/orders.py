"""What each step is asked to do: documents, so that they reach its process as plain bytes, wherever that runs."""

from typing import ClassVar, get_args

from pydantic import Field

from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stamp
from offsite.protos.documents import document, from_json
from offsite.protos.ranges import AtLeastZero, Count, Digest, Finite, Name, Place, Positive, Share, Tier, Word
from offsite.protos.spec import Choice, Grounds, Layers, Shared


@document
class Continued:
    """A version to go on from, and what it was trained on."""

    version: Version
    base: Digest
    trainable: Layers
    recovery: Digest | None  # what brings its adapters back to the base
    method: Choice | None = None  # of its run, which may have measured at another's adapter; None: this run's


@document
class Gather:
    """Put the owner's files that a run reads into the blobs."""

    step: ClassVar[str] = "gather"


@document
class Outlined:
    """The layers of an emulator that is being built, as its manifest will have them."""

    layers: Layers
    trainable: Layers
    shared: Shared
    grounds: Grounds | None


@document
class Encodings:
    """An emulator whose maps were encoded in parts."""

    outline: Outlined
    parts: tuple[Digest, ...]  # files of what its maps are stored as


@document
class Build:
    """Build a run's emulator, and the version that it begins from."""

    step: ClassVar[str] = "build"
    sites: tuple[Name, ...]
    continued: Continued | None = None  # None: begin from what changes nothing
    encoded: Encodings | None = None  # what of it was done in parts


@document
class Divide:
    """Begin a build for several nodes to go on with; what cannot be divided is built at once."""

    step: ClassVar[str] = "divide"
    build: Build


@document
class Encode:
    """Encode the maps of some places of an emulator."""

    step: ClassVar[str] = "encode"
    outline: Outlined
    weights: Digest  # how much each input of the maps counts
    parts: Positive  # in how many they are encoded
    part: Count  # which of them this is


@document
class Update:
    """A site's update, and what is known of it since it was accepted."""

    site: Name
    digest: Digest
    examples: Positive  # that it saw: its weight
    norm: AtLeastZero | None = None  # L2 norm of the change since its broadcast; None: to be measured
    chosen: Layers = ()  # what of the adapter its site chose to train, where it does
    age: Count = 0  # rounds since the one that it was asked for in
    start: Digest | None = None  # the broadcast that it began from; None: that of the last version
    stamp: Stamp | None = None  # of its file's check; None, or on another machine: it is checked before it is folded


@document
class Aggregate:
    """Fold the updates of a round into the next version."""

    step: ClassVar[str] = "aggregate"
    last: Version
    schema: Digest  # what adapters are made of
    tiers: dict[Name, Tier]  # of the sites of the updates
    updates: tuple[Update, ...]
    round: Count = 0  # from 0, counted with those of the runs that this one goes on from
    groups: Positive = 1  # of tensors that may be folded apart
    parts: Positive = 1  # in how many they are folded
    part: Count = 0  # which of them this is
    weights: dict[Name, Share] = Field(default_factory=dict)  # of the updates; empty: as the run weighs them


@document
class Compare:
    """Tell how alike the updates of a round are, given their weights in it."""

    step: ClassVar[str] = "compare"
    folded: Aggregate


@document
class Join:
    """Put the parts of a version together."""

    step: ClassVar[str] = "join"
    last: Version  # what the round began from
    schema: Digest
    round: Count  # as the order had it whose parts they are
    parts: tuple[Version, ...]


@document
class Realign:
    """Tune the emulator's frozen layers beside the newest adapter."""

    step: ClassVar[str] = "realign"
    base: Digest
    manifest: Digest
    adapter: Digest
    recovery: Digest | None


@document
class Evaluate:
    """Measure a model on the owner's held-out data."""

    step: ClassVar[str] = "evaluate"
    base: Digest
    manifest: Digest | None  # of the emulator; None: measure the base
    adapter: Digest | None  # the adapter in it; None: as it is
    recovery: Digest | None
    memory: dict[Word, Digest] = Field(default_factory=dict)  # that the adapter's version has; empty: none answers
    sets: tuple[Name, ...] = ()  # of held-out data; none: all


@document
class Attack:
    """Attack the emulator, as it was handed out and as the sites have tuned it."""

    step: ClassVar[str] = "attack"
    manifest: Digest
    adapter: Digest


@document
class Tune:
    """Tune the base itself on the owner's text of the task, and measure it: the bound."""

    step: ClassVar[str] = "tune"
    base: Digest
    trainable: Layers


@document
class Publish:
    """Write a version that a run publishes as files."""

    step: ClassVar[str] = "publish"
    base: Digest
    adapter: Digest
    recovery: Digest | None
    memory: dict[Word, Digest] = Field(default_factory=dict)  # that the adapter's version has
    folder: Place = ""  # of the files; with one it is not the run's outcome, and not merged


@document
class Gate:
    """Hold a run's outcome against its gate."""

    step: ClassVar[str] = "gate"
    base: Digest
    adapter: Digest
    recovery: Digest | None
    memory: dict[Word, Digest] = Field(default_factory=dict)  # that the adapter's version has
    figures: dict[Word, Finite | None] = Field(default_factory=dict)  # perplexities over all held-out sets


Order = (
    Gather | Build | Divide | Encode | Aggregate | Compare | Join | Realign | Evaluate | Attack | Tune | Gate | Publish
)
ORDERS: dict[str, type[Order]] = {kind.step: kind for kind in get_args(Order)}  # by the step's name


def read(step: str, document: bytes) -> Order:
    """Read what a step is asked to do."""
    return from_json(ORDERS[step], document, where=f"step {step}")
