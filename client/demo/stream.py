"""A demonstration of tasks that come one after the other: each is learned by sites of its own, on top of the last."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from offsite.client.demo.data import SiteData
from offsite.client.demo.play import SHARED, Demo
from offsite.client.demo.processes import Processes
from offsite.client.forgetting import Forgetting
from offsite.client.session import Run, connect
from offsite.protos.errors import InputError

BUILT_IN = 3  # tasks of the built-in ones
LONGEST = 40  # of a task's name, in characters


class Stream(Demo):
    """What is a site's data in a demo is a task's here, and is shared out among SHARED sites."""

    def stream(self) -> Forgetting:
        """Do it all and return what was forgotten; no process is left, however this ends."""
        memory = self._settings.memory
        assert memory is not None, "a stream has one"
        _check([*self._settings.sites])
        self._claim()
        model, owners, public = self._materials()
        tasks = {one.name: _shared(one) for one in (owners if self._settings.sites else owners[:BUILT_IN])}
        exams = {one.name: self._named(one.held_out) for one in owners if one.held_out and one.name in tasks}
        with Processes(self._out / "logs") as processes:
            address = self._start(processes, model, [site for sites in tasks.values() for site in sites])
            with connect(address, identity=self._work / "pki" / "researcher") as session:
                run: Run | None = None
                for task, sites in tasks.items():
                    self._say(f"task {task}: {', '.join(site.name for site in sites)}")
                    spec = replace(self._spec(sites, public), name=f"offsite demo: {task}", evaluation=exams)
                    run = session.submit(replace(spec, task=task, memory=memory), start=run)
                    self._follow(run, processes)
                assert run is not None, "there is a task"
                run.result(self._out)
                forgetting = session.forgetting(run)
        self._return_exams()
        self._write(run.report, forgetting)
        return forgetting

    def _write(self, report: dict[str, Any], forgetting: Forgetting) -> None:
        from offsite.client.plots import forgetting as plot
        from offsite.client.report import write

        (self._out / "report.json").write_text(json.dumps(report, indent=2))
        write(report, self._out / "report.html", stream=forgetting)
        (self._out / "forgetting.json").write_text(json.dumps(forgetting.plain(), indent=2) + "\n")
        (self._out / "forgetting.svg").write_text(plot(forgetting))


def _shared(task: SiteData) -> list[SiteData]:
    """Share the training rows of a task out among sites, each of which has a folder of its own."""
    with task.train.open(encoding="utf-8", newline="\n") as file:  # a row may hold other ends of lines
        rows = list(file)
    if len(rows) < SHARED:
        raise InputError(f"task {task.name} has {len(rows)} rows to train on, and {SHARED} sites share it; give more")
    sites: list[SiteData] = []
    for number in range(SHARED):
        name = _name(task.name, number)
        train = task.train.parents[1] / name / task.train.name
        train.parent.mkdir()
        train.write_text("".join(rows[number::SHARED]), encoding="utf-8")
        sites.append(SiteData(name, train, task.source, held_out=task.held_out))
    return sites


def _check(tasks: Sequence[str]) -> None:
    """Raise InputError for tasks whose sites would have the name of another task, or one that is too long."""
    for task in tasks:
        names = [_name(task, number) for number in range(SHARED)]
        if taken := {*names} & {*tasks}:
            raise InputError(f"--site {task}: it is shared out as {', '.join(names)}, and {taken.pop()} is a task too")
        if len(names[-1]) > LONGEST:
            raise InputError(f"--site {task}: the name is too long for a task; take one of {LONGEST - 3} at most")


def _name(task: str, number: int) -> str:
    return f"{task}-{number + 1}"
