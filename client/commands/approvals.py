"""`offsite site pending | approve | reject`: what a person at a site decides."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.client.commands.options import Format

if TYPE_CHECKING:
    from offsite.client.site.approvals import Approvals, Request

Work = Annotated[Path, typer.Argument(help="The work folder that the site joined with.")]
Asked = Annotated[str, typer.Argument(metavar="REQUEST", help="By the name that `offsite site pending` shows.")]


def pending(
    work: Work,
    every: Annotated[bool, typer.Option("--all", help="Show what was decided, too.")] = False,
    format: Format = "text",
) -> None:
    """Show in words what waits for a person at this site: what `approve` of its policy asks for."""
    from offsite.protos.documents import to_plain
    from offsite.protos.output import say

    requests = [one for one in _approvals(work).all() if every or one.state == "pending"]
    if format == "json":
        say(format, [to_plain(one) for one in requests])
        return
    for one in requests:
        print("\n    ".join([_headline(one), *one.plan]))
    if not requests:
        print("nothing waits for a decision")


def approve(work: Work, request: Asked, format: Format = "text") -> None:
    """Allow what a request asks for; the site's agent goes on with it, now or once it runs again."""
    from offsite.protos.documents import to_plain
    from offsite.protos.output import say

    one = _approvals(work).decide(request, "approved")
    say(format, to_plain(one), f"request {one.id} of run {one.run} is approved")


def reject(
    work: Work,
    request: Asked,
    why: Annotated[str, typer.Option(help="For the site's own log; it is not sent.")] = "",
    format: Format = "text",
) -> None:
    """Refuse what a request asks for; the coordinator hears that a person did."""
    from offsite.protos.documents import to_plain
    from offsite.protos.output import say

    one = _approvals(work).decide(request, "rejected", why=why)
    say(format, to_plain(one), f"request {one.id} of run {one.run} is rejected")


def _headline(one: "Request") -> str:
    asked = f"{one.id}  asked {_moment(one.asked_at)}"
    if one.state == "pending":
        return asked
    return f"{asked}, {one.state} by {one.by} {_moment(one.decided_at)}{f': {one.why}' if one.why else ''}"


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _approvals(work: Path) -> "Approvals":
    from offsite.client.site.approvals import Approvals
    from offsite.protos.errors import NotFoundError

    if not (work / "owner.json").exists():
        raise NotFoundError(f"{work}: no site's work folder; give the one that `offsite site join --work` names")
    return Approvals(work)
