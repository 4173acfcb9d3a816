"""How a step ends that cannot be done: what a person can act on is told in a sentence, a fault of ours is raised."""

import re
from pathlib import Path

import pytest

from offsite.coordinator.node import Node
from offsite.coordinator.runs.steps import performing
from offsite.coordinator.runs.steps.orders import Build
from offsite.protos.documents import to_json
from offsite.protos.errors import MismatchError, OffsiteError
from offsite.protos.spec import RunSpec


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("Error while serializing: I/O error: No space left on device"), "RESOURCE_EXHAUSTED", "is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "RESOURCE_EXHAUSTED", "smaller model"),
        (MemoryError(), "RESOURCE_EXHAUSTED", "memory is missing for the step 'build'"),
        (OSError(5, "Input/output error", "/srv/x"), "RESOURCE_EXHAUSTED", "/srv/x: the disk fails"),
        (FileNotFoundError(2, "No such file or directory", "/srv/x"), "INVALID_ARGUMENT", "/srv/x: No such file"),
        (ValueError("rank 0"), "INVALID_ARGUMENT", "rank 0"),
        (MismatchError("a bit"), "DATA_LOSS", "a bit"),
        (RuntimeError("shapes differ"), None, "shapes differ"),
    ],
)
def test_a_step_that_cannot_be_done_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str | None, message: str
) -> None:
    def fail(*_: object, **__: object) -> dict[str, object]:
        raise error

    monkeypatch.setitem(performing.STEPS, "build", fail)
    order = to_json(Build(sites=("ward",)))
    arguments = (Node(tmp_path, f"file://{tmp_path}/blobs"), "build", to_json(RunSpec(model="m")), order)
    if status is None:
        with pytest.raises(RuntimeError, match=message):
            performing.perform(*arguments)
    else:
        with pytest.raises(OffsiteError, match=re.escape(message)) as raised:
            performing.perform(*arguments)
        assert raised.value.status == status and raised.value.__suppress_context__
