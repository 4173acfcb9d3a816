"""Sentences for the reasons that a site may give, composed here: no text comes from a site."""

from offsite.protos import fleet_pb2 as pb

_NAMES = {number: value.name for number, value in pb.Reason.DESCRIPTOR.values_by_number.items()}
_HINTS = {
    "bases": "it does not work for this model",
    "data": "its data lies outside the folders it allows",
    "methods": "choose another method",
    "min_steps": "ask for more training.steps a round",
    "max_steps": "ask for fewer training.steps a round",
    "min_batch_size": "ask for a larger training.batch_size",
    "max_batch_size": "ask for a smaller training.batch_size",
    "min_rows": "a round would see too few distinct sequences",
    "max_passes": "a run would see its sequences too often: ask for fewer steps, rounds or a smaller batch_size",
    "max_learning_rate": "ask for a lower training.learning_rate",
    "min_gradient_clipping": "ask for a higher training.gradient_clipping",
    "min_length": "ask for a higher training.max_length",
    "max_length": "ask for a lower training.max_length",
    "max_rounds": "ask for fewer rounds; those of the runs that it goes on from count as well",
    "min_noise": "ask for more noise among the stages of upload",
    "max_upload_mib": "ask for a lower rank, or train fewer layers",
    "max_bundle_mib": "the emulator is too large for it",
    "max_emulator_perplexity": "the emulator predicts its text too badly",
    "continued": "let the run begin from the start, not from a version of another run",
    "retentions": "choose another training.retention, or none",
    "replay_rows": "it keeps no rows, or fewer: ask for fewer rows, or another training.retention",
    "approve": "a person at the site has rejected what the run asks for",
    "suspicious": "the emulator or its first adapter has signs of being made to leak text",
}
_FAULTS = {
    "internal": "its trainer ended unexpectedly",
    "data": "its data cannot be read, or holds nothing to learn from at this max_length",
    "emulator": "the emulator or the adapter it was sent cannot be used",
    "engine": "its training engine does not fit the task or its machine",
    "memory": "it ran out of memory; a smaller batch_size or max_length needs less",
    "killed": "its trainer was killed, as happens when a machine runs out of memory",
    "disk": "it has no room on its disk",
    "diverged": "the training diverged; a lower learning_rate may help",
    "transfer": "what it downloaded was not what was announced",
    "update": "its update was not accepted",
    "task": "it cannot use the task",
}


def sentence(reason: int) -> str:
    """Say why a site gave no update."""
    kind, _, name = _NAMES.get(reason, "").lower().partition("_")
    if kind == "bound":
        return f"the site's policy does not allow it ({name}): {_HINTS[name]}"
    return f"{_FAULTS.get(name, 'for a reason unknown to this coordinator')}; the site's own log has the details"
