"""Whether a run can be held to what it asks of its own outcome: when to stop, and what must hold to be published."""

from offsite.coordinator import gates, memory
from offsite.coordinator.gates.losses import Figure
from offsite.protos.spec import RunSpec


def judge_gate(spec: RunSpec) -> list[gates.Check]:
    """Return the checks of a run's gate; raises ValueError for one that looks at what is not measured or named."""
    checks = gates.make(spec.gate)
    for check in checks:
        if missing := [name for name in (*check.texts, *check.pairs) if name not in spec.probes]:
            raise ValueError(f"gate: {check.name} reads the probe {missing[0]!r}; name its file in probes")
        if check.name == Figure.name and not spec.evaluation:
            raise ValueError(f"gate: {check.name} looks at the figures: give held-out examples as evaluation")
    return checks


def judge_patience(spec: RunSpec) -> None:
    """Raise ValueError if a run is to stop by what it does not measure, or must not before its last round."""
    if not spec.patience:
        if spec.least_gain:
            raise ValueError("least_gain is for a run that stops: give a patience, or leave it out")
        return
    if not spec.evaluation:
        raise ValueError("patience: versions are judged on held-out examples: give some as evaluation, or leave it out")
    if memory.make(spec.memory.name, spec.memory.settings).paced:
        raise ValueError(
            f"patience: memory {spec.memory.name} moves at a pace that the number of rounds gives it, so that a run "
            "which stops before would leave it half-way; leave patience out, or use another memory"
        )
