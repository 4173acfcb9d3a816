"""What a stream of tasks has learned and forgotten, from the reports of the runs that learned them.

    L[i][j]   loss of the plug-in on the sets of task j after run i, in nats a token; i = 0: the base as it was

A set is of the task whose name it has, or with which its name begins, as "hospital" and "hospital-icu" are of the task
"hospital". All is of L: what is known of perplexity is exp of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from offsite.protos.errors import InputError
from offsite.protos.figures import BASE_TUNED, BASE_ZERO_SHOT, PLUG_IN, without_infinities


@dataclass(frozen=True)
class Stage:
    """A run of a stream, and what it cost."""

    run: str
    task: str
    method: str
    strategy: str
    memory: str
    bytes_down: int
    bytes_up: int
    kept_bytes: int  # that the owner keeps of its last version beside the adapter


@dataclass(frozen=True)
class Forgetting:
    """The losses of a stream; properties are means over the tasks that they can be told of, NaN where there is none."""

    stages: tuple[Stage, ...]
    losses: tuple[dict[str, float], ...]  # L: by task, before the first run and after each
    bounds: dict[str, float] = field(default_factory=dict)  # by task, of the base tuned on it, where that was measured

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that were learned and measured, in their order."""
        return tuple(dict.fromkeys(stage.task for stage in self.stages if stage.task in self.losses[-1]))

    def learned(self, task: str) -> int:
        """Return after which run, counted from one, a task was first learned."""
        return 1 + next(at for at, stage in enumerate(self.stages) if stage.task == task)

    @property
    def earlier(self) -> tuple[str, ...]:
        """The tasks that were learned before the last run."""
        return tuple(task for task in self.tasks if self.learned(task) < len(self.stages))

    @property
    def average(self) -> float:
        """Loss after the last run."""
        return _mean([self.losses[-1][task] for task in self.tasks])

    def of(self, task: str) -> float:
        """Return how much of a task was forgotten: L[n] - min L[i], over the runs i from the one that learned it."""
        after = [losses[task] for losses in self.losses[self.learned(task) : -1] if task in losses]
        return self.losses[-1][task] - min(after, default=math.nan)

    @property
    def forgetting(self) -> float:
        """How much of the earlier tasks was forgotten; below 0 where later ones helped."""
        return _mean([self.of(task) for task in self.earlier])

    @property
    def backward(self) -> float:
        """Backward transfer: what earlier tasks gained since they were learned (Lopez-Paz, arXiv 1706.08840)."""
        return _mean(
            [self.losses[self.learned(task)].get(task, math.nan) - self.losses[-1][task] for task in self.earlier]
        )

    @property
    def forward(self) -> float:
        """Forward transfer: what tasks gained over the base from the runs before the one that learned them."""
        later = [task for task in self.tasks if self.learned(task) > 1]
        first, before = self.losses[0], [self.losses[self.learned(task) - 1] for task in later]
        return _mean(
            [first.get(task, math.nan) - one.get(task, math.nan) for task, one in zip(later, before, strict=True)]
        )

    @property
    def intransigence(self) -> float:
        """What is lacking to the base tuned on a task, when it is learned (Chaudhry et al., arXiv 1801.10112)."""
        known = [task for task in self.tasks if task in self.bounds]
        return _mean([self.losses[self.learned(task)].get(task, math.nan) - self.bounds[task] for task in known])

    def plain(self) -> dict[str, Any]:
        """Return it as a JSON document has it, with the means, null for what is not known."""
        document: dict[str, Any] = without_infinities(asdict(self) | {"summary": self.summary()})[0]
        return document

    def summary(self) -> dict[str, float]:
        """Return the means by name."""
        names = ("average", "forgetting", "backward", "forward", "intransigence")
        return {name: getattr(self, name) for name in names}


def forgetting(reports: Sequence[Mapping[str, Any]], *, kept: Mapping[str, int] | None = None) -> Forgetting:
    """Make the losses of a stream of its runs' reports, the first first; `kept` is by run what the owner keeps of it.

    Raises InputError where no run says which task it learned, or no set is of a task.
    """
    tasks = [str(report.get("task") or "") for report in reports]
    if not any(tasks):
        raise InputError("none of these runs says which task it learned; give each a task, as in --set task=hospital")
    first = _by_task(reports[0], BASE_ZERO_SHOT, tasks)
    losses = [first, *(_by_task(report, PLUG_IN, tasks) for report in reports)]
    if not losses[-1]:
        names = ", ".join(sorted({task for task in tasks if task}))
        raise InputError(
            f"the last run was measured on no set of the tasks {names}: name its held-out sets after them (evaluation)"
        )
    bounds: dict[str, float] = {}
    for task, report in zip(tasks, reports, strict=True):
        bounds |= {name: loss for name, loss in _by_task(report, BASE_TUNED, tasks).items() if name == task}
    stages = [_stage(report, task, (kept or {})) for report, task in zip(reports, tasks, strict=True)]
    return Forgetting(tuple(stages), tuple(losses), bounds)


def _stage(report: Mapping[str, Any], task: str, kept: Mapping[str, int]) -> Stage:
    moved, run = report["bytes"], str(report["run"])
    method, strategy, memory = (
        str((report.get(part) or {}).get("name", "")) for part in ("method", "strategy", "memory")
    )
    return Stage(run, task, method, strategy, memory, int(moved["down"]), int(moved["up"]), kept.get(run, 0))


def _by_task(report: Mapping[str, Any], figure: str, tasks: Sequence[str]) -> dict[str, float]:
    """Return by task the mean loss of a report's figure over the tokens of its sets, where it was measured."""
    sums: dict[str, list[float]] = {}
    for name, row in report["sites"].items():
        value, tokens = row.get(figure), report["tokens"].get(name, 0)
        task = _task_of(name, tasks)
        if task and value is not None and value > 0 and tokens:
            total, count = sums.setdefault(task, [0.0, 0.0])
            sums[task] = [total + tokens * math.log(value), count + tokens]
    return {task: total / count for task, (total, count) in sums.items()}


def _task_of(name: str, tasks: Sequence[str]) -> str:
    """Return the task that a set is of; the longest where several fit."""
    fitting = [task for task in tasks if task and (name == task or name.startswith((f"{task}-", f"{task}.")))]
    return max(fitting, key=len, default="")


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
