"""Which task's adapter an input needs, refined by the model itself (MOS, Sun et al., arXiv 2412.09441, section 3.3).

A first guess of an input's class names the class's task; with that task's adapter the class is predicted again, and so
on until the task that was predicted is the one whose adapter predicted it. Nothing is written on the way.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Predict = Callable[[int, Tensor], Tensor]


class Retrieval(NamedTuple):
    """What becomes of n inputs: logits (n, C), the task (n,) whose adapter gave them, passes, and who has settled."""

    logits: Tensor
    tasks: Tensor
    passes: int
    settled: Tensor  # (n,) bool: another pass would change nothing of them

    @property
    def classes(self) -> Tensor:
        """The likeliest class (n,) of each input."""
        return self.logits.argmax(dim=1)


def refine(first: Tensor, task_of: Tensor, predict: Predict, *, most: int = 4) -> Retrieval:
    """Refine first guesses of classes (n,), int64, in at most `most` passes.

    `task_of` (C,) is the task of each class. `predict` returns logits (m, C) of the inputs at some rows (m,), made with
    the adapter of a task; it is asked for those inputs alone whose task has changed. An input that goes round in a
    circle keeps its last prediction. Raises ValueError unless there are inputs and a pass.
    """
    if not len(first) or most < 1:
        raise ValueError(f"{len(first)} inputs in {most} passes are nothing to refine; both are at least 1")
    tasks, moving = task_of[first].clone(), torch.ones(len(first), dtype=torch.bool)
    logits, passes = torch.empty(0), 0
    while passes < most and bool(moving.any()):
        passes += 1
        for task in sorted({*tasks[moving].tolist()}):
            rows = (moving & (tasks == task)).nonzero().flatten()
            part = predict(task, rows)
            if not len(logits):
                logits = part.new_zeros(len(first), part.shape[1])
            logits[rows] = part
        wanted = task_of[logits.argmax(dim=1)]
        moving = wanted != tasks
        if passes < most:
            tasks = torch.where(moving, wanted, tasks)
    return Retrieval(logits, tasks, passes, ~moving)
