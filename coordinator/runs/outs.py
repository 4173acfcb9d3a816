"""Sites that take part in a run no longer: ejected by a person, or gone by themselves. The run goes on without them."""

from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.steps.results import BUILD, SELECT
from offsite.coordinator.store.journal import LIVE, Journal
from offsite.protos.errors import ConflictError, InputError, NotFoundError
from offsite.protos.events import SiteOut


def eject(journal: Journal, run: str, site: str, *, by: str, reason: str) -> None:
    """Take a site out of a run.

    Raises InputError without a reason, ConflictError unless the run is worked on, NotFoundError if it has no such site.
    """
    if not reason.strip():
        raise InputError("a site is ejected for a reason, which stays in the run's audit trail")
    state = journal.run(run).state
    if state != "running":
        what = "no site has been chosen yet; cancel it instead" if state in LIVE else "it is over"
        raise ConflictError(f"run {run} is {state}: {what}")
    if site not in (there := members(journal, run)):
        raise NotFoundError(f"site {site} takes no part in run {run}; those that do: {', '.join(sorted(there))}")
    out(journal, run, site, by=by, reason=reason)


def leave(journal: Journal, site: str, *, run: str = "", reason: str = "") -> list[str]:
    """Take a site out of a run, or of all that it takes part in, by its own will; return their ids.

    Raises NotFoundError if it takes no part in the run that is named.
    """
    there = [row.id for row in journal.live() if row.state == "running" and site in members(journal, row.id)]
    if run and run not in there:
        raise NotFoundError(f"site {site} takes no part in a run {run} that is not over")
    left = [run] if run else there
    for one in left:
        out(journal, one, site, by=site, reason=reason or "it left")
    if not run:
        journal.see_no_longer(site)
    return left


def out(journal: Journal, run: str, site: str, *, by: str, reason: str) -> None:
    """Record it, and end what the site works on."""
    journal.put_out(run, SiteOut(site=site, by=by, reason=reason))
    journal.end_tasks(run, site, journal.outs(run)[site])


def members(journal: Journal, run: str) -> set[str]:
    """Return the sites that take part in a run that is worked on, those that are out by now among them."""
    history = History(journal, run)
    if history.get(BUILD) is None:
        return {*history[SELECT].names}
    return {*history.members(len(history.opened()))}
