"""The journal's tables, and the states that their rows go through."""

import time
from typing import Any

import sqlalchemy as sa

from offsite.protos.events import Event
from offsite.protos.events import data as plain_data

Row = sa.Row[Any]

LIVE = ("queued", "waiting", "running")  # queued: for a place; waiting: for sites
# Of a task not over, in their order.
OPEN = ("offered", "taken", "awaiting approval", "downloading", "loading", "training", "uploading")
ENDED = ("uploaded", "refused", "failed", "stalled", "late", "out")  # of one that is over

# Sorted by their bytes wherever they are kept: sites are folded in the order of their names.
Text = sa.String().with_variant(sa.String(collation="C"), "postgresql")
Whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # an integer up to `ranges.AMOUNT`, such as of bytes

metadata = sa.MetaData()
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("token", Text, unique=True),
    sa.Column("owner", Text),
    sa.Column("spec", sa.LargeBinary),
    sa.Column("state", Text, index=True),
    sa.Column("error", Text, default=""),
    sa.Column("note", Text, server_default=""),  # what a live run waits for
    sa.Column("waiting_at", sa.Double, server_default="0"),  # since when it has waited for its sites; 0: it does not
    sa.Column("report", Text, default=""),
    sa.Column("submitted_at", sa.Double),
    sa.Column("finished_at", sa.Double, default=0.0),
    sa.Column("name", Text),  # this and the next two are the spec's: a spec can be long
    sa.Column("rounds", Whole),
    sa.Column("priority", Whole, server_default="0"),
    sa.Index("runs_newest", "submitted_at", "id"),
    sa.Index("runs_of_owner", "owner", "submitted_at", "id"),
)
tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("run", Text, primary_key=True),
    sa.Column("round", Whole, primary_key=True),
    sa.Column("site", Text, primary_key=True),
    sa.Column("attempt", Whole, primary_key=True),
    sa.Column("state", Text),
    sa.Column("spec", sa.LargeBinary),
    sa.Column("signature", sa.LargeBinary),
    sa.Column("moved_at", sa.Double),  # when it last got further
    sa.Column("step", Whole, default=0),
    sa.Column("steps", Whole, default=0),
    sa.Column("loss", sa.Double, default=0.0),
    sa.Column("message", Text, default=""),
    sa.Column("bytes_down", Whole, default=0),
    sa.Column("bytes_up", Whole, default=0),
    sa.Column("update", Text, default=""),
    sa.Column("norm", sa.Double),  # L2 norm of the update's change; None: a version accepted it that did not keep that
    sa.Column("metrics", Text, default=""),
    sa.Index("tasks_by_state", "state", "site"),
    sa.Index("tasks_of_round", "run", "round", "state"),  # a count of open tasks reads no task
)
steps = sa.Table(  # work that was done and what it gave, so that it is never done again
    "steps",
    metadata,
    sa.Column("run", Text, primary_key=True),
    sa.Column("name", Text, primary_key=True),
    sa.Column("value", sa.JSON),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", Whole, primary_key=True, autoincrement=True),
    sa.Column("run", Text, index=True),
    sa.Column("at", sa.Double),
    sa.Column("kind", Text),
    sa.Column("round", Whole, default=0),
    sa.Column("site", Text, default=""),
    sa.Column("data", sa.JSON),
    sa.Index("events_of_site", "run", "round", "site", "at"),
)
sites = sa.Table(
    "sites",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("seen_at", sa.Double),
    sa.Column("examples", Whole, default=0),
    sa.Column("version", Text, default=""),
    sa.Column("policy", Text, default=""),
)
gateways = sa.Table(  # processes that serve this journal's sites and people
    "gateways",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("address", Text),
    sa.Column("version", Text),
    sa.Column("policy", Text),  # the digest of the owner's policy
    sa.Column("owner", Text),  # the digest of the owner's public key
    sa.Column("started_at", sa.Double),
    sa.Column("seen_at", sa.Double),
)
leaders = sa.Table(  # one row: the gateway that dispatches
    "leaders",
    metadata,
    sa.Column("id", Whole, primary_key=True),
    sa.Column("name", Text),
    sa.Column("term", Whole),  # counts the changes of the name
)
artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("run", Text, primary_key=True),
    sa.Column("name", Text, primary_key=True),
    sa.Column("digest", Text, index=True),
    sa.Column("size", Whole),
)
withdrawals = sa.Table(  # of versions that were taken back
    "withdrawals",
    metadata,
    sa.Column("run", Text, primary_key=True),
    sa.Column("round", Whole, primary_key=True),
    sa.Column("at", sa.Double),
    sa.Column("by", Text),
    sa.Column("reason", Text),
)
requests = sa.Table(  # for certificates, and what the authority answered
    "requests",
    metadata,
    sa.Column("caller", Text, primary_key=True),  # the serial number, hexadecimal, of the certificate that came with it
    sa.Column("key", Text, primary_key=True),  # the fingerprint of the key that a certificate is asked for
    sa.Column("request", sa.LargeBinary),
    sa.Column("at", sa.Double),
    sa.Column("state", Text, index=True),  # unsigned, signed or refused
    sa.Column("certificate", sa.LargeBinary),
    sa.Column("refusal", Text, server_default=""),
)
lists = sa.Table(  # the newest list of the certificates that hold, for all gateways
    "lists",
    metadata,
    sa.Column("number", Whole, primary_key=True),
    sa.Column("pem", sa.LargeBinary),
)


def event_row(run: str, event: Event) -> sa.Insert:
    """Insert an event, now."""
    return sa.insert(events).values(**event_values(run, event))


def event_values(run: str, event: Event) -> dict[str, Any]:
    """Return the columns of an event, now."""
    data = plain_data(event)
    beside = {"round": data.pop("round", 0), "site": data.pop("site", "")}
    return {"run": run, "at": time.time(), "kind": event.kind, "data": data, **beside}
