"""One task's training: from a bundle, a broadcast adapter and the site's data to a trained adapter and its metrics."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import distributed

from offsite.client.site import exam, outcome, rows
from offsite.client.site.engines import ENGINES, Engine, Ranks, join
from offsite.client.site.exam import HeldOut, Paper
from offsite.client.site.handout import Handout, load, referred
from offsite.client.site.inspection import BATCHES, judge
from offsite.client.site.job import TrainerJob
from offsite.client.site.reasons import because, faults
from offsite.client.site.rows import Rows
from offsite.emulator import modality, optimisers, parts, retention
from offsite.emulator.examples import Reading
from offsite.emulator.methods import Adapter
from offsite.emulator.methods.base import Choosing, Measuring
from offsite.emulator.methods.proof import Effects, Witness
from offsite.emulator.modality import Score
from offsite.emulator.parts.training import Trained, freeze, select, whole_schema
from offsite.emulator.retention import Pulling
from offsite.emulator.tuning.adapting import shares
from offsite.protos.documents import to_json
from offsite.protos.errors import MismatchError, RunError
from offsite.protos.exams import Exam
from offsite.protos.spec import LocalTraining, Span, UpdateMetrics

SENTENCE = 300  # characters of a warning; events of several processes must not mix

Say = Callable[..., None]


def train(job: TrainerJob, *, say: Say, rendezvous: Path) -> None:
    """Do this process's part of a job; the first rank writes what is sent. Raises OffsiteError and system errors."""
    started = time.time()
    with faults("FAULT_TASK"):
        ENGINES[job.engine.name].check(job.task.training, job.engine)
    with because("FAULT_ENGINE"):
        ranks = join(job.engine, rendezvous)
    make_repeatable()
    with faults("FAULT_DATA"):
        data = rows.read(job)  # before the model: it is quick, and the likeliest to be at fault
        data, held_out = rows.hold_out(job, data, secret=Path(job.secret).read_bytes())
    with faults("FAULT_EMULATOR"):
        handout = load(job)
    if job.task.examines:
        if ranks.rank == 0:
            _examine(job, handout, held_out, ranks, say=say)
        return
    adapter, metrics = tune(job, handout, data, ranks, held_out=held_out, say=say, started=started)
    if ranks.rank == 0:
        with faults("FAULT_TASK"):
            outcome.keep_rows(data, job)
            outcome.write(adapter, metrics, handout, job)


def tune(
    job: TrainerJob, handout: Handout, data: Reading, ranks: Ranks, *, held_out: HeldOut, say: Say, started: float
) -> tuple[Adapter, UpdateMetrics]:
    """Train what a site was handed on its data; return what the adapter has become, and what is told of it.

    Of the adapter it is the part that has trained. Raises OffsiteError.

    All but the reading and the writing of files is here, and all of the job's policy that is about data or emulator.
    """
    with faults("FAULT_DATA"):
        schedule = rows.schedule_rows(job, data, handout.tokenizer)
    say("data", **schedule.counts, warnings=[warning[:SENTENCE] for warning in schedule.warnings[:4]])
    job.policy.check_rows(job.task, seen=schedule.seen, distinct=schedule.distinct)
    if schedule.old:
        job.policy.check_rehearsal(job.task, old=schedule.old, kept=schedule.kept)
    with faults("FAULT_TASK"):
        job.policy.check_shares(_shares(job.task.training))
    if job.engine.whole:
        handout.model.to(ranks.device)
    _inspect(job, handout, schedule, say=say)
    sheet = exam.paper(job, held_out, handout.tokenizer) if job.task.exam and held_out.examples else None
    before, after = sheet.marks(handout.model) if sheet else [], None
    if isinstance(handout.method, Measuring):
        loaded, trained = time.time(), Trained(whole_schema(handout.method, handout.broadcast))
        with faults("FAULT_EMULATOR"):
            steps = _measure(handout.method, handout, schedule, ranks, say=say)
        adapter = handout.method.state(handout.model, handout.places)
    else:
        with faults("FAULT_EMULATOR"), referred(handout, job) as reference:
            schedule = schedule.refer(reference, batch_size=_at_once(job))
        with faults("FAULT_EMULATOR"):
            _choose(handout, schedule, ranks)
            trained = _select(job, handout, schedule, ranks)
        engine, witness = _prepare(_packing(job, handout, say=say), handout, trained, ranks)
        loaded = time.time()
        steps = _run(job, engine, witness, schedule, say=say)
        adapter = trained.of(engine.gather(handout.method, handout.places))
        after = sheet.marks(engine.model) if sheet else None
    outcome.check(adapter, trained.of(handout.broadcast))
    told = _tell(sheet, before, after, say=say) if sheet else None
    return adapter, UpdateMetrics(
        examples=schedule.seen,
        tokens=sum(steps.targets),
        loss=steps.mean_loss,
        losses=tuple(steps.losses) if job.policy.per_step_metrics else (),
        spans=(
            Span(kind="loading", start=started, end=max(started, loaded)),
            Span(kind="training", start=loaded, end=max(loaded, time.time())),
        ),
        engine=f"{job.engine.title}, {ranks.device.type}",
        chosen=trained.chosen,
        peak_memory_bytes=outcome.peak_memory_bytes(),
        exam=told,
    )


def _tell(sheet: Paper, before: Sequence[Score], after: Sequence[Score] | None, *, say: Say) -> Exam | None:
    """Say at the site how its exam went, and return what leaves of it."""
    told = sheet.exam(before, after)
    figures = {"before": exam.shown(before)} | ({"after": exam.shown(after)} if after is not None else {})
    say("exam", rows=len(before), **figures, leaves=told is not None, warnings=[])
    return told


def _examine(job: TrainerJob, handout: Handout, held_out: HeldOut, ranks: Ranks, *, say: Say) -> None:
    """Measure what was handed out, by one process, and write what leaves of that: whole, or not at all."""
    if job.engine.whole:
        handout.model.to(ranks.device)
    sheet = exam.paper(job, held_out, handout.tokenizer)
    if sheet.rows:
        judge(job, handout.model, sheet.rows, handout.places, signs=handout.signs)
    told = _tell(sheet, sheet.marks(handout.model), None, say=say)
    if told is not None:
        partial = Path(job.out) / "exam.partial"
        partial.write_bytes(to_json(told))
        partial.replace(Path(job.out) / "exam.json")


def _shares(spec: LocalTraining) -> list[float]:
    """Return the share of the learning rate of each step of a round, as far as it is left at the end."""
    held, steps = retention.make(spec.retention.name, spec.retention.settings), shares(spec)
    if not isinstance(held, Pulling):
        return steps
    return [share * held.remains ** (len(steps) - step) for step, share in enumerate(steps)]


def make_repeatable() -> None:
    """Have the same job give the same bytes, on a GPU too where torch can."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by a property


def _inspect(job: TrainerJob, handout: Handout, schedule: Rows, *, say: Say) -> None:
    """Look at the emulator, on what it would train on first, before any gradient is taken; raises OffsiteError."""
    parts = -(-job.task.training.batch_size // _at_once(job))
    batches = [batch.share(at, parts) for batch in islice(schedule.texts(), BATCHES) for at in range(parts)]
    verdict = judge(job, handout.model, batches, handout.places, signs=handout.signs)
    perplexity = verdict.perplexity if math.isfinite(verdict.perplexity) else None  # JSON has no infinity
    say("inspected", perplexity=perplexity, warnings=verdict.warnings)


def _packing(job: TrainerJob, handout: Handout, *, say: Say) -> TrainerJob:
    """Return the job with rows that are packed if it asks for that and the model, with its adapter in it, allows it."""
    if not job.engine.packing or modality.packs(handout.model):
        return job
    what = "this model mixes sequences that are packed, or takes none; its rows are padded instead"
    say("packing", warnings=[what])
    return replace(job, engine=replace(job.engine, packing=False))


def _at_once(job: TrainerJob) -> int:
    """Return how many rows the memory has room for, where every process looks at all of a batch."""
    return job.engine.micro_batch or job.task.training.batch_size


def _choose(handout: Handout, schedule: Rows, ranks: Ranks) -> None:
    """Have a method that does so choose by the first batch what trains, the same in every process."""
    if isinstance(handout.method, Choosing):
        for tensor in handout.method.choose(handout.model, handout.places, next(schedule.texts())):
            if ranks.world > 1:
                distributed.broadcast(tensor, 0)


def _select(job: TrainerJob, handout: Handout, schedule: Rows, ranks: Ranks) -> Trained:
    """Return what of the adapter trains, the same in every process."""

    def agree(scores: torch.Tensor) -> torch.Tensor:
        scores = scores.to(ranks.device)
        if ranks.world > 1:
            distributed.broadcast(scores, 0)
        return scores

    choice = job.task.training.part
    return select(
        parts.make(choice.name, choice.settings),
        whole_schema(handout.method, handout.broadcast),
        outcome.turn(job.task),
        model=handout.model,
        places=handout.places,
        batch=lambda: next(schedule.texts()),
        agree=agree,
    )


def _prepare(job: TrainerJob, handout: Handout, trained: Trained, ranks: Ranks) -> tuple[Engine, Witness | Effects]:
    """Return the engine of a job, and who sees that what is said to train does."""
    spec, task = job.task.training, job.task
    live = freeze(handout.method.named_parameters(handout.model, handout.places), trained)
    optimiser = optimisers.make(spec.optimiser.name, spec.optimiser.settings)
    witness = Effects(handout.model, live) if optimiser.forward_only else Witness(live)
    rounds = task.rounds_before + task.round
    with because("FAULT_ENGINE"):
        engine = ENGINES[job.engine.name](
            *(handout.model, live, spec, job.engine, ranks), first_step=rounds * spec.steps, anchor=handout.anchor
        )
    handout.model.train()
    torch.manual_seed(spec.seed + rounds * ranks.world + ranks.rank)  # of dropout; different in each process
    return engine, witness


@dataclass
class Steps:
    """Loss of each step, over how many terms it is the mean, and how many target tokens it saw."""

    losses: list[float] = field(default_factory=list)
    terms: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    @property
    def mean_loss(self) -> float:
        """Mean over all terms: target tokens, or what the objective compares."""
        total = sum(loss * count for loss, count in zip(self.losses, self.terms, strict=True))
        return total / sum(self.terms)


def _run(job: TrainerJob, engine: Engine, witness: Witness | Effects, schedule: Rows, *, say: Say) -> Steps:
    """Take the steps of a round; raises RunError at a loss that is not finite, MismatchError if a tensor is idle."""
    steps, count = Steps(), job.task.training.steps
    for step, batch in enumerate(schedule.batches(), start=1):
        loss = engine.step(batch)
        if step == 1:
            with faults("FAULT_EMULATOR", MismatchError):  # a tensor that does not train is not what was agreed
                witness.judge()
        if not math.isfinite(loss):
            what = f"the loss is {loss} at step {step} of {count}"
            raise RunError(f"{what}; a lower learning_rate may help", reason="FAULT_DIVERGED")
        steps.losses.append(loss)
        steps.terms.append(batch.terms)
        steps.targets.append(batch.targets)
        say("step", step=step, steps=count, loss=loss, tokens=batch.targets, usage=outcome.usage())
    return steps


def _measure(method: Measuring, handout: Handout, schedule: Rows, ranks: Ranks, *, say: Say) -> Steps:
    """Measure a round's batches, each in one of the processes, and add the sums of all; raises RunError.

    Every process holds the whole model, whatever the engine. A step is a batch, whose loss only tells how it went.
    """
    model, places, count = handout.model, handout.places, len(schedule.order)
    device = next(model.parameters()).device
    losses, targets = torch.zeros(count, dtype=torch.float64), []
    for step, batch in enumerate(schedule.texts()):
        targets.append(batch.targets)
        if step % ranks.world == ranks.rank:
            losses[step] = method.measure(model, places, batch.to(device))
            say(
                "step",
                step=step + 1,
                steps=count,
                loss=float(losses[step]),
                tokens=batch.targets,
                usage=outcome.usage(),
            )
    if ranks.world > 1:
        for own in (losses, *method.sums(model, places)):
            total = own.to(ranks.device, copy=True)
            distributed.all_reduce(total)
            own.copy_(total)
    if not bool(losses.isfinite().all()):
        raise RunError(f"the loss of a batch of {count} is not finite, so that none is measured")
    return Steps(losses.tolist(), targets, targets)
