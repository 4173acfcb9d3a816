"""The sites' and the researchers' end. `connect` opens a coordinator; importing this loads no tensor library."""

from offsite.client.session import Event, Run, Session, connect
from offsite.protos.errors import OffsiteError
from offsite.protos.spec import Choice, RunSpec, TrainingSpec

__all__ = ["Choice", "Event", "OffsiteError", "Run", "RunSpec", "Session", "TrainingSpec", "connect"]
