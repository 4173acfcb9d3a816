"""Runs beside each other: what a federation gives that each site alone, or all data in one place, would not.

from offsite.client import RunSpec, connect
from offsite.client.beside import compare, isolated

with connect("coordinator:8443", identity="kits/alice") as session:
    spec = RunSpec(model="base", rounds=5, evaluation={"exam": "exam.jsonl"})
    runs = {"federated": session.submit(spec), **isolated(session, spec)}
    print(compare({name: run.wait().report for name, run in runs.items()}).plain())
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from offsite.client.session import Run, Session
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.figures import BASE_ZERO_SHOT, PLUG_IN, without_infinities
from offsite.protos.spec import RunSpec


def isolated(session: Session, spec: RunSpec, *, token: str = "") -> dict[str, Run]:
    """Submit a run for each site of `spec` by itself, all else equal; return them as "SITE alone".

    Each site takes as many rounds and steps as it would take in the run of all. The same token gives the same runs.
    Raises ConflictError where there is no site yet.
    """
    sites = spec.sites or tuple(site.name for site in session.sites())
    if not sites:
        raise ConflictError("no site is enrolled yet, so that none can train alone; name some (sites), or wait for one")
    return {
        f"{site} alone": session.submit(
            replace(spec, sites=(site,), min_sites=1, name=f"{spec.name or 'run'}: {site} alone"),
            token=f"{token}-{site}" if token else "",
        )
        for site in sites
    }


OVERALL = "overall"  # over all held-out sets, as reports have it


@dataclass(frozen=True)
class Comparison:
    """One figure of several runs, in perplexity: over all held-out sets, and by set; None where it was not measured."""

    figure: str
    base: dict[str, float | None]  # by set, and "overall", of the base as it was
    runs: dict[str, dict[str, float | None]]  # the same by the runs' names
    bytes_up: dict[str, int]  # by run, from all of its sites

    @property
    def sets(self) -> tuple[str, ...]:
        """The held-out sets, and "overall" at the end."""
        names = {name for row in (self.base, *self.runs.values()) for name in row}
        return (*sorted(names - {OVERALL}), OVERALL)

    def plain(self) -> dict[str, Any]:
        """Return it as a JSON document has it."""
        document: dict[str, Any] = without_infinities(asdict(self))[0]
        return document


def compare(reports: Mapping[str, Mapping[str, Any]], *, figure: str = PLUG_IN) -> Comparison:
    """Put a figure of several reports beside each other, by the names given.

    Raises InputError where they are of several bases, whose perplexities say nothing of each other, or where none has
    the figure.
    """
    digests = {name: report["base"]["digest"] for name, report in reports.items()}
    if len({*digests.values()}) > 1:
        first, other = next(iter(digests)), next(name for name in digests if digests[name] != [*digests.values()][0])
        raise InputError(f"{first} and {other} are of two base models, whose perplexities cannot be compared")
    rows = {name: _row(report, figure) for name, report in reports.items()}
    if all(value is None for row in rows.values() for value in row.values()):
        raise InputError(f"none of these runs has measured {figure}: name held-out data in their evaluation")
    base: dict[str, float | None] = {}
    for report in reports.values():
        base = _row(report, BASE_ZERO_SHOT) | base
    return Comparison(figure, base, rows, {name: int(report["bytes"]["up"]) for name, report in reports.items()})


def _row(report: Mapping[str, Any], figure: str) -> dict[str, float | None]:
    rows: dict[str, Any] = {**report["sites"], OVERALL: report[OVERALL]}
    return {name: row.get(figure) for name, row in rows.items()}
