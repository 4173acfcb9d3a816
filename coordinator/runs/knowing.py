"""What a run's task is known by, where its data are to tell it from others: what its sites have measured before."""

from offsite.coordinator.runs.continuing import ancestor, granted, version
from offsite.coordinator.runs.grant import Known
from offsite.coordinator.store.journal import Journal
from offsite.emulator import methods
from offsite.emulator.routing import Telling
from offsite.protos.documents import canonical, to_plain
from offsite.protos.errors import InputError
from offsite.protos.spec import Ancestor, RunSpec


def known(journal: Journal, spec: RunSpec, continues: Ancestor | None) -> Known:
    """Return what the run that `known_by` names has measured; `continues` is what `start` stands for.

    Raises InputError unless that tells a row's task by the row alone, and as those of the tasks before do.
    """
    run = ancestor(journal, spec.known_by, field="known_by")
    choice, what = granted(journal, run.run).method, f"known_by: run {run.run}"
    method = methods.make(choice.name, choice.settings)
    if not isinstance(method, Telling) or method.asks_model:
        telling = [name for name, kind in methods.METHODS.sound().items() if not getattr(kind, "asks_model", True)]
        raise InputError(
            f"{what} is of the method {choice.name}, which does not tell the task of a row by that row alone; name a "
            f"run of {' or '.join(sorted(telling))}"
        )
    before = granted(journal, continues.run).known if continues else None
    ours, theirs = (canonical(to_plain(one)).decode() for one in (choice, before.method if before else choice))
    if ours != theirs:
        raise InputError(f"{what} measured by {ours}, and the tasks before by {theirs}: only like sums are compared")
    return Known(method=choice, sums=version(journal, run).adapter)
