"""The sites' and the researchers' end. `connect` opens a coordinator; importing this loads no tensor library.

What it offers is loaded when it is asked for: the command line is in this package as well, and what it starts must
be able to set up gRPC before that is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offsite.client.adapters import compose, export
    from offsite.client.answers import Artifact, Event, Site, Status, Version
    from offsite.client.forgetting import Forgetting
    from offsite.client.session import Run, Session, connect
    from offsite.protos.errors import OffsiteError
    from offsite.protos.spec import Choice, RunSpec, TrainingSpec

__all__ = [
    "Artifact",
    "Choice",
    "Event",
    "Forgetting",
    "OffsiteError",
    "Run",
    "RunSpec",
    "Session",
    "Site",
    "Status",
    "TrainingSpec",
    "Version",
    "compose",
    "connect",
    "export",
]

_HOMES = {
    "offsite.client.adapters": ("compose", "export"),
    "offsite.client.answers": ("Artifact", "Event", "Site", "Status", "Version"),
    "offsite.client.forgetting": ("Forgetting",),
    "offsite.client.session": ("Run", "Session", "connect"),
    "offsite.protos.errors": ("OffsiteError",),
    "offsite.protos.spec": ("Choice", "RunSpec", "TrainingSpec"),
}


def __getattr__(name: str) -> Any:
    """Load one name from where it is at home."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
