"""What the workers of a simulation are told, and what they tell: documents, a line of JSON each."""

from typing import Annotated

from pydantic import Field

from offsite.client.site.policy import Policy
from offsite.protos.documents import document
from offsite.protos.ranges import (
    TEXT,
    AboveZero,
    Amount,
    AtLeastZero,
    Count,
    Finite,
    Flag,
    Name,
    Place,
    Seed,
    Sentence,
    Tier,
)
from offsite.protos.spec import Choice, Manifest, TaskSpec

Text = Annotated[str, Field(max_length=TEXT)]
OWN = "offsite.deploy.simulation.visit:own_training"  # what a site's trainer does


@document
class Setup:
    """What a worker works on, from its first round to its last."""

    socket: Place  # where it is told the rest
    number: Count  # of the worker
    spool: Place  # file for its updates
    data: Place
    sites: Count  # into how many the data is cut; 0: it is a folder with one for each
    partition: Choice
    seed: Seed
    policy: Policy
    train: Place = OWN  # module:function that is given a Visit and returns an adapter and its metrics


@document
class RoundOrder:
    """What all virtual sites of a round have in common, by tier."""

    bundle: Place  # folder
    manifest: Manifest
    tasks: dict[Tier, TaskSpec]
    adapters: dict[Tier, Place]  # files of what they start from
    max_norm: AboveZero
    residuals: Place = ""  # folder for what stages leave out; empty: none does


@document
class SiteOrder:
    """A site that trains."""

    site: Name
    tier: Tier
    previous: Count | None = None  # the last round in which the run took its update, where stages feed back


@document
class Order:
    """Sites to train, and before them a round to begin with."""

    round: RoundOrder | None = None
    sites: tuple[SiteOrder, ...] = ()


@document
class Reply:
    """What a site's work came to: an update in the spool, or why there is none."""

    site: Name
    metrics: Text = ""  # UpdateMetrics as JSON, for the journal; empty: there is no update
    examples: Count = 0  # these three are also of the metrics
    tokens: Amount = 0
    loss: Finite = 0.0
    norm: AtLeastZero = 0.0  # of the change
    worker: Count = 0
    offset: Amount = 0  # in its spool
    refused: Flag = False
    message: Sentence = ""


@document
class Replies:
    """What the sites of an order came to, or what is wrong with all of them."""

    sites: tuple[Reply, ...] = ()
    fault: Sentence = ""
    resource: Flag = False  # whether it is memory or disk that is missing, and not the run's fault
