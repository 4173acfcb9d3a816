"""What the workers of a simulation are told, and what they tell: documents, a line of JSON each."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from offsite.client.site.policy import Policy
from offsite.coordinator.runs.versions import Version
from offsite.protos.documents import document
from offsite.protos.ranges import (
    TEXT,
    AboveZero,
    Amount,
    AtLeastZero,
    Count,
    Digest,
    Finite,
    Flag,
    Line,
    Name,
    Place,
    Positive,
    Seed,
    Sentence,
    Share,
    Tier,
)
from offsite.protos.spec import OBJECTIVE, Choice, Manifest, TaskSpec

Text = Annotated[str, Field(max_length=TEXT)]
OWN = "offsite.deploy.simulation.visit:own_training"  # what a site's trainer does


@document
class Setup:
    """What a worker works on, from its first round to its last."""

    socket: Place  # where it is told the rest
    number: Count  # of the worker
    workers: Count
    spool: Place  # folder of all workers' updates
    data: Place
    sites: Count  # into how many the data is cut; 0: it is a folder with one for each
    partition: Choice
    seed: Seed
    policy: Policy
    objective: Choice = OBJECTIVE  # by which rows are read
    train: Place = OWN  # module:function that is given a Visit and returns an adapter and its metrics


@document
class RoundOrder:
    """What all virtual sites of a round have in common, by tier."""

    bundle: Place  # folder
    manifest: Manifest
    tasks: dict[Tier, TaskSpec]
    adapters: dict[Tier, Place]  # files of what they start from
    anchors: dict[Tier, Place] = Field(default_factory=dict)  # and of what their training is held to
    max_norm: AboveZero
    residuals: Place = ""  # folder for what stages leave out; empty: none does

    @property
    def number(self) -> int:
        """Which round it is."""
        return next(iter(self.tasks.values())).round

    def residual(self, site: str, number: int) -> Path | None:
        """Return the file of what stages left out of a site's update of a round; None if no stage feeds back."""
        return Path(self.residuals) / f"{site}.{number}.safetensors" if self.residuals else None


@document
class Batch:
    """Updates that lie together in a spool: of some sites of one tier, in the order of their names."""

    worker: Count
    offset: Amount  # in its spool
    size: Amount  # bytes
    tier: Tier
    sites: tuple[Name, ...]
    groups: tuple[Line, ...] | None = None  # of the adapter, that they have; None: all


@document
class FoldOrder:
    """Fold some groups of tensors of a round's updates."""

    strategy: Choice
    upload: tuple[Choice, ...]
    last: Version
    schema: Digest
    tiers: tuple[Tier, ...]  # of the sites that may train next
    blobs: Place  # URL, of what it reads
    kept: Place  # URL, of what it gives
    scratch: Place  # folder
    batches: tuple[Batch, ...]
    weights: tuple[tuple[Share | None, ...], ...]  # of the updates of each batch; None: it is left out
    parts: Positive
    part: Count


@document
class Order:
    """Sites to train, and before them a round to begin with; or a part of its fold."""

    round: RoundOrder | None = None
    tier: Tier = ""
    sites: tuple[Name, ...] = ()
    previous: tuple[Count | None, ...] = ()  # where stages feed back, of each the last round that took its update
    fold: FoldOrder | None = None


@document
class Failure:
    """Why a site gave no update."""

    site: Name
    refused: Flag
    message: Sentence


@document
class Work:
    """What the work of an order's sites came to. What it says of updates is of those of its batch, in their order."""

    batch: Batch
    metrics: tuple[Text, ...]  # UpdateMetrics as JSON, for the journal; the next three are of them, too
    examples: tuple[Positive, ...]
    tokens: tuple[Amount, ...]
    loss: tuple[Finite, ...]
    norm: tuple[AtLeastZero, ...]  # of the change
    failures: tuple[Failure, ...] = ()


@document
class Reply:
    """What an order came to, or what is wrong with all of it."""

    work: Work | None = None
    version: Version | None = None  # of the groups that were folded
    fault: Sentence = ""
    resource: Flag = False  # whether it is memory or disk that is missing, and not the run's fault
