"""What stands above both ends: simulations here, and beside them the files that deploy the real ones."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offsite.deploy.simulation.simulate import Simulation, simulate
    from offsite.deploy.simulation.world import World

__all__ = ["Simulation", "World", "simulate"]

_MODULES = {"Simulation": "simulate", "World": "world", "simulate": "simulate"}


def __getattr__(name: str) -> Any:
    """Load what a simulation needs, both ends and torch, when it is asked for."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"offsite.deploy.simulation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
