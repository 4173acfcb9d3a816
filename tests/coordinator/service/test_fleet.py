"""What the coordinator makes of a site's report."""

from types import SimpleNamespace
from typing import Any

import pytest

from offsite.coordinator.service.fleet import _also
from offsite.coordinator.service.progress import Pace, ahead
from offsite.coordinator.store.journal import Key
from offsite.protos import fleet_pb2 as pb
from offsite.protos.errors import InputError
from offsite.protos.events import LINE, LINES, Usage


def test_a_sites_lines_are_made_fit_to_show_and_are_few() -> None:
    lines = [f"{n}\x1b[2J{'x' * 500}" for n in range(99)]
    told = _also(pb.ReportRequest(lines=lines))["lines"]
    assert len(told) == LINES and told[-1] == f"98 [2J{'x' * 500}"[:LINE]
    assert _also(pb.ReportRequest()) == {}


def test_use_goes_into_the_event_alone_and_has_bounds() -> None:
    also = _also(pb.ReportRequest(usage=pb.Usage(memory_bytes=9, cpu_s=0.5)))
    task: Any = SimpleNamespace(state="training", step=1, bytes_down=0)
    move = Pace().move(Key("r", 0, "ward", 0), task, also=also, state="training", step=2)
    assert move and move.event is not None and "usage" not in move.values
    assert vars(move.event)["usage"] == Usage(memory_bytes=9, cpu_s=0.5)
    with pytest.raises(InputError, match="usage: nan is not a number"):
        _also(pb.ReportRequest(usage=pb.Usage(cpu_s=float("nan"))))


def test_to_wait_for_a_person_comes_before_what_is_downloaded() -> None:
    order = ("taken", "awaiting approval", "downloading")
    for before, state in zip(order, order[1:], strict=False):
        task: Any = SimpleNamespace(state=before, step=0, bytes_down=0)
        later: Any = SimpleNamespace(state=state, step=0, bytes_down=0)
        assert ahead(task, state=state, step=0, received=0) and not ahead(later, state=before, step=0, received=0)
