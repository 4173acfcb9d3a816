"""What a trainer process does, one per rank, once it has been forked (`offsite.protos.processes`).

It tells what happens as JSON lines on standard output: {"event": "loading"}, {"event": "data", "examples", "distinct",
"sequences", "divided", "cut", "without_target", "left_out", "warnings"}, {"event": "inspected", "perplexity",
"warnings"}, {"event": "packing", "warnings"}, {"event": "step", "step", "steps", "loss", "tokens", "usage"},
{"event": "exam", "rows", "before", "after", "leaves", "warnings"}, {"event": "done"}, or {"event": "error", "status",
"reason", "message"}. A perplexity that is too large for a number is null; an emulator that is refused is an error. The
first rank tells everything, the others their errors. The exit code is that of the error.
"""

import errno
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from offsite.client.site import training
from offsite.client.site.engines import ENGINES
from offsite.client.site.job import TrainerJob
from offsite.emulator.catalogue import FORMATS, METHODS, MODALITIES, OBJECTIVES, OPTIMISERS
from offsite.protos.documents import from_json
from offsite.protos.errors import OffsiteError, ResourceError
from offsite.protos.processes.forkserver import end_with_input

SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
}  # what torchrun's are there
MESSAGE_LENGTH = 900  # a line stays under PIPE_BUF, so that lines of several ranks do not mix


class Speaker:
    """The events of this process; what anything else prints on standard output goes to standard error."""

    def __init__(self) -> None:
        """Take standard output for the events alone."""
        self._pipe = os.dup(1)
        os.dup2(2, 1)
        self.first = os.environ.get("RANK", "0") == "0"

    def __call__(self, event: str, **fields: Any) -> None:
        """Tell an event, if this is the first rank."""
        if self.first:
            self._write({"event": event, **fields})

    def error(self, error: OffsiteError) -> None:
        """Tell why this rank ends."""
        fields = {"status": error.status, "reason": error.reason, "message": str(error)[:MESSAGE_LENGTH]}
        self._write({"event": "error", **fields})

    def _write(self, event: dict[str, Any]) -> None:
        os.write(self._pipe, json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def preload(engine: str) -> None:
    """Import what the trainers of an engine import when they first need it."""
    ENGINES[engine].preload()
    for family in (METHODS, FORMATS, MODALITIES, OBJECTIVES, OPTIMISERS):
        family.preload()


def main(path: Path) -> int:
    """Do a job and return the exit code."""
    say = Speaker()
    try:
        job = from_json(TrainerJob, path.read_bytes(), where=str(path))
        say("loading")
        training.train(job, say=say, rendezvous=path.with_name("rendezvous"))
    except Exception as fault:  # the process's border: everything becomes an event and an exit code
        traceback.print_exc()
        error = explain(fault)
        say.error(error)
        return error.exit_code
    say("done")
    return 0


def explain(error: Exception) -> OffsiteError:
    """Turn any error into one for a person at the other end of a pipe, in one line."""
    if isinstance(error, OffsiteError):
        return error
    text = next(iter(str(error).splitlines()), "")
    lower = text.lower()
    if isinstance(error, MemoryError) or any(
        words in lower for words in ("out of memory", "allocate memory", "not enough memory")
    ):
        return ResourceError(
            "the training ran out of memory; train with --checkpointing, a smaller --micro-batch or a higher "
            f"--zero-stage, or ask for a lower max_length ({text})",
            reason="FAULT_MEMORY",
        )
    # safetensors has an error of its own for what the system says
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "no space left on device" in lower:
        return ResourceError(f"the disk is full; make room where the site keeps its work ({text})", reason="FAULT_DISK")
    return OffsiteError(f"{type(error).__name__}: {text}")


if __name__ == "__main__":  # as a site's own launcher starts it
    for name, slurms in SLURM.items():
        if slurms in os.environ:
            os.environ.setdefault(name, os.environ[slurms])
    threading.Thread(target=end_with_input, daemon=True).start()
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # threads of a collective that another rank never enters would hold the process
