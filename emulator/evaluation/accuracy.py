"""How often a model picks the right answer of several. The one file that opens lm-eval's harness.

A question is put as "Question: ...\\nAnswer:", and the model picks the choice it finds most likely as what follows: by
its log-likelihood, or by that over its number of characters, which does not favour short choices.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from logging import ERROR, getLogger
from typing import Any

from torch import nn

from offsite.emulator.quiet import quiet
from offsite.emulator.zoo.tasks import LocalTask


@dataclass(frozen=True)
class Accuracy:
    """Shares of `n` questions that were answered right, with their standard errors."""

    accuracy: float
    stderr: float
    normalised: float  # by the choices' lengths in characters
    normalised_stderr: float
    n: int


def accuracy(
    model: nn.Module, tokenizer: Any, tasks: Sequence[LocalTask], *, limit: int | None = None, batch_size: int = 8
) -> dict[str, Accuracy]:
    """Ask the first `limit` questions of each task; returns answers by the task's name. Nothing is downloaded.

    The model and the tokenizer stay as they were. Raises ValueError if lm-eval is not installed or two tasks have one
    name.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must have names of their own, got {', '.join(names)}")
    training = model.training
    with tempfile.TemporaryDirectory() as folder, _silence():
        try:
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(
                f"task accuracy is measured with lm-eval, which cannot be imported ({error}); "
                "run pip install 'offsite[evaluation]'"
            ) from None
        try:
            # The harness gives a tokenizer without one a padding token.
            harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            loaded = TaskManager(include_defaults=False).load([_described(task, folder) for task in tasks])
            report = evaluate(harness, loaded, limit=limit, log_samples=False)
        finally:
            model.train(training)
    return {name: _read(report["results"][name], report["n-samples"][name]["effective"]) for name in names}


def _described(task: LocalTask, folder: str) -> dict[str, Any]:
    """Describe a task in the harness's own terms."""
    return {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task.file)}, "cache_dir": folder},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def _read(result: dict[str, Any], n: int) -> Accuracy:
    return Accuracy(
        accuracy=float(result["acc,none"]),
        stderr=float(result["acc_stderr,none"]),
        normalised=float(result["acc_norm,none"]),
        normalised_stderr=float(result["acc_norm_stderr,none"]),
        n=int(n),
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the harness's advice and bars off the screen."""
    log = getLogger("lm_eval")
    level = log.level
    log.setLevel(ERROR)
    try:
        with quiet(), redirect_stderr(StringIO()):
            yield
    finally:
        log.setLevel(level)
