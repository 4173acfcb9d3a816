"""The journal's tables, and the states that their rows go through."""

import time
from typing import Any

import sqlalchemy as sa

from offsite.protos.events import Event
from offsite.protos.events import data as plain_data

Row = sa.Row[Any]

LIVE = ("queued", "waiting", "running")  # queued: for a place; waiting: for sites
OPEN = ("offered", "taken", "downloading", "loading", "training", "uploading")  # of a task not over, in their order

metadata = sa.MetaData()
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("token", sa.String, unique=True),
    sa.Column("owner", sa.String),
    sa.Column("spec", sa.LargeBinary),
    sa.Column("state", sa.String, index=True),
    sa.Column("error", sa.String, default=""),
    sa.Column("note", sa.String, server_default=""),  # what a live run waits for
    sa.Column("waiting_at", sa.Float, server_default="0"),  # since when it has waited for its sites; 0: it does not
    sa.Column("report", sa.String, default=""),
    sa.Column("submitted_at", sa.Float),
    sa.Column("finished_at", sa.Float, default=0.0),
    sa.Column("name", sa.String),  # this and the next are the spec's, for lists: a spec can be long
    sa.Column("rounds", sa.Integer),
    sa.Index("runs_newest", "submitted_at", "id"),
    sa.Index("runs_of_owner", "owner", "submitted_at", "id"),
)
tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("site", sa.String, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("state", sa.String),
    sa.Column("spec", sa.LargeBinary),
    sa.Column("signature", sa.LargeBinary),
    sa.Column("moved_at", sa.Float),  # when it last got further
    sa.Column("step", sa.Integer, default=0),
    sa.Column("steps", sa.Integer, default=0),
    sa.Column("loss", sa.Float, default=0.0),
    sa.Column("message", sa.String, default=""),
    sa.Column("bytes_down", sa.Integer, default=0),
    sa.Column("bytes_up", sa.Integer, default=0),
    sa.Column("update", sa.String, default=""),
    sa.Column("metrics", sa.String, default=""),
    sa.Index("tasks_by_state", "state", "site"),
    sa.Index("tasks_of_round", "run", "round", "state"),  # a count of open tasks reads no task
)
steps = sa.Table(  # work that was done and what it gave, so that it is never done again
    "steps",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.JSON),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run", sa.String, index=True),
    sa.Column("at", sa.Float),
    sa.Column("kind", sa.String),
    sa.Column("round", sa.Integer, default=0),
    sa.Column("site", sa.String, default=""),
    sa.Column("data", sa.JSON),
    sa.Index("events_of_site", "run", "round", "site", "at"),
)
sites = sa.Table(
    "sites",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("seen_at", sa.Float),
    sa.Column("examples", sa.Integer, default=0),
    sa.Column("version", sa.String, default=""),
    sa.Column("policy", sa.String, default=""),
)
artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("digest", sa.String, index=True),
    sa.Column("size", sa.Integer),
)


def event_row(run: str, event: Event) -> sa.Insert:
    """Insert an event, now."""
    return sa.insert(events).values(**event_values(run, event))


def event_values(run: str, event: Event) -> dict[str, Any]:
    """Return the columns of an event, now."""
    data = plain_data(event)
    beside = {"round": data.pop("round", 0), "site": data.pop("site", "")}
    return {"run": run, "at": time.time(), "kind": event.kind, "data": data, **beside}
