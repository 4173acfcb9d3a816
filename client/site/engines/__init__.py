"""Engines: what runs the steps of a site's training."""

from offsite.client.site.engines.base import Engine, Ranks, join
from offsite.client.site.engines.plain import Plain
from offsite.client.site.engines.zero import Zero

ENGINES: dict[str, type[Engine]] = {"plain": Plain, "deepspeed": Zero}

__all__ = ["ENGINES", "Engine", "Ranks", "join"]
