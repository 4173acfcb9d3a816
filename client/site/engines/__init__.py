"""Engines: what runs the steps of a site's training."""

from collections.abc import Callable, Mapping

from torch import nn

from offsite.client.site.engines.base import Engine, Ranks, join
from offsite.client.site.engines.plain import Plain
from offsite.client.site.engines.zero import Zero
from offsite.client.site.job import EngineSpec
from offsite.protos.spec import LocalTraining

# Called with the attached model, its trained parameters by adapter key, and how and by whom they are trained.
ENGINES: dict[str, Callable[[nn.Module, Mapping[str, nn.Parameter], LocalTraining, EngineSpec, Ranks], Engine]] = {
    "plain": Plain,
    "deepspeed": Zero,
}

__all__ = ["ENGINES", "Engine", "Ranks", "join"]
