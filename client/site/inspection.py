"""What a site looks at before it trains: the adapter it was sent, and the emulator with that adapter in it.

A signature says who made them, not that they are harmless. The owner chooses the frozen layers and the adapter, and
both together can make the adapter's change give the text away (PEFTLeak, arXiv 2506.04453).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from offsite.client.site.job import TrainerJob
from offsite.client.site.policy import refusal
from offsite.client.site.reasons import faults
from offsite.emulator import retention
from offsite.emulator.evaluation.inspection import inspect
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.methods.base import Disclosure, takes
from offsite.emulator.modality import Batch
from offsite.emulator.parts.training import whole_schema
from offsite.kernels.schema import Rule, Tensors, settle
from offsite.protos import tensors
from offsite.protos.errors import MismatchError

BATCHES = 2  # of the task's own size: forward passes alone, about as much work as one of its steps
NEAR = 1e-4  # of the largest value of a tensor: far above the rounding of fp64, and far below what a trap needs


@dataclass(frozen=True)
class Verdict:
    """What was found of an emulator that may be trained on; the warnings are sentences."""

    perplexity: float
    warnings: tuple[str, ...]


def receive(path: Path, method: Method, start: Adapter) -> Adapter:
    """Read the adapter that was sent; raises MismatchError unless it is one of the method, and of the start's sizes.

    Its fixed tensors are those of the start: bit for bit, or nearly where they are made of the emulator's weights. Made
    of what sites have measured, they are as the owner says, and as many values train as in the start.
    """
    if takes(method):
        return _begun(path, method, start)
    schema = settle(method.schema(start), {key: tensor.shape for key, tensor in start.items()})
    fixed = {key: start[key] for key, field in schema.items() if field.rule is Rule.FIXED}
    tensors.check(path, schema, fixed={} if is_derived(method) else fixed, what="the adapter to start from")
    broadcast = tensors.load(path)
    if other := [key for key, own in fixed.items() if not _near(broadcast[key], own)]:
        raise MismatchError(
            f"the adapter to start from: tensor {other[0]} is not the one that the emulator's weights give, "
            "and does not train"
        )
    return broadcast


def _begun(path: Path, method: Method, start: Adapter) -> Adapter:
    """Read an adapter whose start the site cannot make; raises ValueError too, for what is none of the method's."""
    broadcast = tensors.load(path)
    schema = settle(method.schema(broadcast), {key: tensor.shape for key, tensor in broadcast.items()})
    tensors.check(path, schema, what="the adapter to start from")
    own, sent = (
        sum(one[key].numel() for key, field in method.schema(one).items() if field.rule is not Rule.FIXED)
        for one in (start, broadcast)
    )
    if own != sent:
        raise MismatchError(f"the adapter to start from has {sent} values that train, the task's method {own}")
    return broadcast


def receive_anchor(job: TrainerJob, method: Method, broadcast: Adapter) -> Tensors:
    """Read what the task's retention holds training to; raises MismatchError unless it is of the broadcast's tensors.

    Raises ValueError for a retention that is not known.
    """
    chosen, schema = job.task.training.retention, whole_schema(method, broadcast)
    expected, what = retention.make(chosen.name, chosen.settings).expects(schema), "what training is held to"
    if bool(expected) != bool(job.anchor):
        raise MismatchError(f"{what}: the retention {chosen.name} needs {'some' if expected else 'no'} tensors")
    if not job.anchor:
        return {}
    entries = tensors.header(Path(job.anchor))
    if expected.keys() == entries.keys():
        with faults("FAULT_EMULATOR", MismatchError):
            expected = settle(expected, {key: entry.shape for key, entry in entries.items()})
    tensors.check(Path(job.anchor), expected, what=what)
    return tensors.load(Path(job.anchor))


def is_derived(method: Method) -> bool:
    """Tell whether a method's start is computed from weights, in the last digits of which two machines may differ."""
    return method.disclosure is Disclosure.PARTS


def strange_start(broadcast: Adapter, start: Adapter, dtype: torch.dtype, *, derived: bool = False) -> list[str]:
    """Return a sentence if a run's first adapter is not the start that the site derives itself, bit for bit.

    `dtype` is that of the site's copy of the emulator, to which a start that was read off the emulator is rounded. One
    that was computed from the emulator's weights (`derived`) is the start if it is nearly that.
    """
    strange = [
        key
        for key, own in start.items()
        if not torch.equal(broadcast[key], own)
        and not torch.equal(broadcast[key].to(dtype).to(own.dtype), own)
        and not (derived and _near(broadcast[key], own))
    ]
    if not strange:
        return []
    return [
        f"the run's first adapter is not the start that the task's method and seed give ({strange[0]} and "
        f"{len(strange) - 1} other tensors): one of the owner's choice can make its change give the text away"
    ]


def _near(sent: torch.Tensor, own: torch.Tensor) -> bool:
    return bool((sent - own).abs().max() <= NEAR * own.abs().max())


def judge(
    job: TrainerJob, model: nn.Module, batches: Sequence[Batch], places: Mapping[int, int], *, signs: Sequence[str]
) -> Verdict:
    """Inspect an emulator on the batches that it would train on first, and hold it against the site's policy.

    Every round anew, though the emulator's files stay: a later adapter can make a pipe of the same honest layers.
    `signs` are what was found suspicious before. Cost: two forward passes a batch. Raises MismatchError for a tensor
    that is not finite, whatever the policy says, and RefusedError.
    """
    findings = inspect(model, batches, places)
    if findings.infinite:
        raise MismatchError(f"the emulator: tensor {findings.infinite[0]} holds values that are not finite")
    if signs := [*signs, *findings.suspicions()]:
        if job.policy.suspicious == "refuse":
            raise refusal("suspicious", _first(signs))
        signs = [f"the emulator is suspicious: {_first(signs)}"]
    most = job.policy.max_emulator_perplexity
    measured = f"its perplexity on this site's own text is {findings.perplexity:.4g}"
    if most is not None and not findings.perplexity <= most:
        raise refusal("max_emulator_perplexity", f"{measured}, more than {most:g}")
    if findings.perplexity > findings.vocabulary:
        signs.append(
            f"the emulator predicts worse than guessing: {measured}, that of guessing {findings.vocabulary}; it may "
            "have too few layers to teach anything"
        )
    return Verdict(findings.perplexity, tuple(signs))


def _first(sentences: Sequence[str]) -> str:
    more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
    return f"{sentences[0]}{more}"
