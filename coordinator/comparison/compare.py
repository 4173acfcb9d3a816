"""Candidates side by side: each measured in its turn, a failure reported in its row, then all judged together."""

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from offsite.coordinator.bundles import building
from offsite.coordinator.comparison.bench import Bench, Tell
from offsite.coordinator.comparison.measure import measured, unfinished
from offsite.coordinator.comparison.plan import Plan
from offsite.coordinator.comparison.rows import Candidate, Comparison, Row
from offsite.coordinator.comparison.texts import Texts, digests
from offsite.coordinator.comparison.verdict import frontier, judged, recommend
from offsite.coordinator.store.finished import Finished
from offsite.emulator import zoo
from offsite.emulator.precision import DTYPES
from offsite.emulator.zoo.tasks import LocalTask, locate
from offsite.protos.chunks import digest_file
from offsite.protos.documents import to_plain
from offsite.protos.errors import InputError, OffsiteError
from offsite.protos.recipes import render

_APART = (
    "protected_from",
    "train",
    "held_out",
    "public",
    "calibration",
    "general",
)  # what is judged later, or digested


def compare(plan: Plan, folder: Path, *, tell: Tell) -> Comparison:
    """Measure all candidates of a plan and judge them.

    What is finished is kept in `folder`: called again after a kill, it goes on with the candidate it was at. Raises
    InputError if the model or a text cannot be used; a candidate that fails has the reason in its row.
    """
    bench = _bench(plan, folder, tell)
    rows: list[Row] = []
    for index, (candidate, label) in enumerate(zip(plan.candidates, _labels(plan.candidates), strict=True)):
        tell(f"candidate {index + 1}: {label}", index, len(plan.candidates))
        row = Row(number=index + 1, label=label, candidate=candidate)
        try:
            row = replace(row, measured=measured(candidate, bench))
        except (OffsiteError, ValueError, RuntimeError, MemoryError) as error:  # torch's own are of the last two kinds
            row = replace(row, fault=" ".join(str(error).split()) or type(error).__name__)
        rows.append(judged(row, protected_from=plan.protected_from))
        # Candidates that have the emulator in common stand side by side; after the last it is no longer needed.
        done = unfinished(candidate, bench)
        if index + 1 == len(plan.candidates) or unfinished(plan.candidates[index + 1], bench) != done:
            shutil.rmtree(done, ignore_errors=True)
    best = frontier(rows)
    recommended, reason = recommend(rows, protected_from=plan.protected_from)
    return Comparison(
        model=plan.model,
        base=bench.identity["base"],
        settings=plan.settings,
        public=str(bench.texts.public_path),
        rows=tuple(replace(row, frontier=row.number in best) for row in rows),
        recommended=recommended,
        reason=reason,
    )


def _bench(plan: Plan, folder: Path, tell: Tell) -> Bench:
    try:
        source = zoo.locate(plan.model, cache=zoo.cache_folder())
        tokenizer = zoo.load_tokenizer(source)
        texts = Texts.read(plan, tokenizer, folder)  # before the model: it is quick, and the likeliest to be at fault
        tasks = _tasks(plan)
        base, _ = zoo.load_base(source, dtype=DTYPES[plan.training.precision])
    except ValueError as error:
        raise InputError(str(error)) from error
    common = {name: value for name, value in plan.settings.items() if name not in _APART}
    return Bench(
        plan=plan,
        folder=folder,
        base=base.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer=tokenizer,
        texts=texts,
        tasks=tasks,
        finished=Finished(folder / "finished"),
        identity={
            "base": to_plain(building.ref(source, base)),
            "settings": common,
            "texts": digests(plan) | {f"task {task.name}": digest_file(task.file) for task in tasks},
            "version": importlib.metadata.version("offsite"),
        },
        tell=tell,
    )


def _tasks(plan: Plan) -> tuple[LocalTask, ...]:
    if plan.tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError("--task asks lm-eval, which is not installed: pip install 'offsite[evaluation]'")
    return tuple(locate(name, cache=zoo.cache_folder()) for name in plan.tasks)


def _labels(candidates: Sequence[Candidate]) -> list[str]:
    """Name candidates by the parts of their names in which they differ."""
    parts = [(render(one.builders), render([one.trainable]), render([one.method])) for one in candidates]
    differ = [len({part[at] for part in parts}) > 1 for at in range(3)]
    return [", ".join(text for at, text in enumerate(part) if differ[at] or at == 0) for part in parts]
