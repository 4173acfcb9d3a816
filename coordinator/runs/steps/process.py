"""What the process of a step does, once it has been forked (`offsite.protos.processes`).

Its job is a JSON object {"threads", "step", "root", "identity", "spec", "order"}. It leaves a file beside it: `result`,
or `error` with {"status", "reason", "message"}.
"""

import json
import os
import traceback
from pathlib import Path

import torch

from offsite.coordinator.aggregation import STRATEGIES
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.performing import perform
from offsite.emulator.catalogue import BUILDERS, FORMATS, METHODS, MODALITIES
from offsite.protos.documents import from_json
from offsite.protos.errors import OffsiteError


def preload() -> None:
    """Import what steps import when they first need it."""
    for family in (METHODS, BUILDERS, FORMATS, MODALITIES, STRATEGIES):
        family.preload()


def main(path: Path) -> int:
    """Do a step and return the exit code."""
    job = json.loads(path.read_bytes())
    torch.set_num_threads(job["threads"] or os.cpu_count() or 1)
    spec = job["spec"].encode()
    try:
        result = perform(job["step"], job["root"], job["identity"], spec, job["order"].encode())
        path.with_name("result").write_bytes(result)
    except Exception as fault:  # the process's border
        traceback.print_exc()
        grant = from_json(Grant, spec, where="run spec")
        error = fault if isinstance(fault, OffsiteError) else OffsiteError(grant.fault(fault))
        told = {"status": error.status, "reason": error.reason, "message": str(error)}
        path.with_name("error").write_text(json.dumps(told))
    return 0
