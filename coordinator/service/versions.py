"""Versions as messages."""

from collections.abc import Iterable

from offsite.coordinator.runs.lineage import Entry
from offsite.coordinator.store.blobs import Blobs
from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import plain


def reply(entries: Iterable[Entry], blobs: Blobs) -> pb.VersionsReply:
    """Return versions in their order."""
    return pb.VersionsReply(versions=[_message(entry, blobs) for entry in entries])


def _message(entry: Entry, blobs: Blobs) -> pb.Version:
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
        kept=sum(blobs.size(digest) for digest in entry.state.values() if digest in blobs),
        withdrawal=pb.Withdrawal(at=gone.at, by=gone.by, reason=plain(gone.reason, most=1000)) if gone else None,
    )
