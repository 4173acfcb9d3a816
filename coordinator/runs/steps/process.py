"""What the process of a step does, once it has been forked (`offsite.protos.processes`).

Its job is a JSON object {"threads", "root", "blobs", "step", "spec", "order", "log"}. On standard output it tells
"result" or "error", with {"status", "reason", "message", "unusable"}: a full disk must not keep it from that.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from offsite.coordinator.aggregation import STRATEGIES
from offsite.coordinator.memory import MEMORIES
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.performing import perform
from offsite.coordinator.store import Unusable
from offsite.emulator.catalogue import BUILDERS, FORMATS, METHODS, MODALITIES
from offsite.protos.documents import from_json
from offsite.protos.errors import OffsiteError
from offsite.protos.processes.memory import keep_freed
from offsite.protos.telemetry.logs import begin

log = logging.getLogger(__name__)


def preload() -> None:
    """Import what steps import when they first need it."""
    for family in (METHODS, BUILDERS, FORMATS, MEMORIES, MODALITIES, STRATEGIES):
        family.preload()


def main(path: Path) -> int:
    """Do a step and return the exit code."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)  # what anything else prints
        json.dump(outcome(json.loads(path.read_bytes())), output)
    return 0


def outcome(job: dict[str, Any]) -> dict[str, Any]:
    """Do a step and return what is told of it."""
    begin(job["log"]["form"], **job["log"]["about"])
    keep_freed()  # folding reads one tensor after the other
    torch.set_num_threads(job["threads"] or os.cpu_count() or 1)
    start = time.monotonic()
    log.info("the step begins")
    spec, order = job["spec"].encode(), job["order"].encode()
    try:
        result = perform(Node(Path(job["root"]), job["blobs"]), job["step"], spec, order).decode()
        log.info("the step is done, after %.1f s", time.monotonic() - start)
        return {"result": result}
    except Exception as fault:  # the process's border
        grant = from_json(Grant, spec, where="run spec")
        error = fault if isinstance(fault, OffsiteError) else OffsiteError(grant.fault(fault))
        log.exception("step %s: %s", job["step"], error)
        fields = {"status": error.status, "reason": error.reason, "message": str(error)}
        return {"error": fields | {"unusable": isinstance(error, Unusable)}}
