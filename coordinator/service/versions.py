"""Versions as messages."""

from collections.abc import Iterable

from offsite.coordinator.runs.lineage import Entry
from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import plain


def reply(entries: Iterable[Entry]) -> pb.VersionsReply:
    """Return versions in their order."""
    return pb.VersionsReply(versions=[_message(entry) for entry in entries])


def _message(entry: Entry) -> pb.Version:
    gone = entry.withdrawal
    return pb.Version(
        run=entry.run,
        round=entry.round,
        task=entry.task,
        owner=entry.owner,
        at=entry.at,
        start=f"{entry.start.run}:{entry.start.round}" if entry.start else "",
        figures=entry.figures,
        sites=entry.sites,
        state=entry.state,
        digest=entry.digest,
        withdrawal=pb.Withdrawal(at=gone.at, by=gone.by, reason=plain(gone.reason, most=1000)) if gone else None,
    )
