"""How gradients, or losses alone, become steps: optimisers, by the names that their papers have for them."""

from offsite.emulator import catalogue
from offsite.emulator.optimisers.base import Estimator, Optimiser
from offsite.kernels.plugins import Plugins

OPTIMISERS: Plugins[Optimiser] = catalogue.OPTIMISERS
make = OPTIMISERS.make

__all__ = ["OPTIMISERS", "Estimator", "Optimiser", "make"]
