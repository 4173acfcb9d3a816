"""Retention: what a site does while it trains, so as not to forget what earlier runs have learned."""

from offsite.emulator import catalogue
from offsite.emulator.retention.base import Penalising, Pulling, Recalling, Rehearsing, Retention
from offsite.kernels.plugins import Plugins

__all__ = ["RETENTIONS", "Penalising", "Pulling", "Recalling", "Rehearsing", "Retention", "make"]

RETENTIONS: Plugins[Retention] = catalogue.RETENTIONS
make = RETENTIONS.make
