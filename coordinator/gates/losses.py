"""How well the plug-in predicts: the task's text, and public text that it should not have forgotten."""

import math
from dataclasses import dataclass
from typing import ClassVar

from offsite.coordinator.gates.base import Evidence, Finding, Unprobed
from offsite.protos.figures import BASE_ZERO_SHOT, PLUG_IN, perplexity


@dataclass(frozen=True)
class Figure(Unprobed):
    """Hold the plug-in's figure over all held-out sets to a bound, and to what the base does."""

    name: ClassVar[str] = "figure"
    most: float = math.inf  # perplexity
    gain: float = 0.0  # nats a token by which it has to be better than the base; below 0 it may be worse

    def judge(self, evidence: Evidence) -> Finding:
        """See `Check`."""
        value = evidence.figures.get(PLUG_IN, math.nan)
        gain = math.log(evidence.figures.get(BASE_ZERO_SHOT, math.nan)) - math.log(value)
        bound = f" and a perplexity of at most {self.most:g}" if self.most < math.inf else ""
        return Finding(
            check=self.name,
            holds=value <= self.most and gain >= self.gain,  # false of NaN
            reason=f"the plug-in has perplexity {value:.2f} and gains {gain:.3f} nats a token over the base; a gain of "
            f"at least {self.gain:g}{bound} is asked for",
        )


@dataclass(frozen=True)
class General:
    """Hold what the plug-in has lost on public text to a bound."""

    probe: str  # rows of public text
    most: float = 0.05  # nats a token

    name: ClassVar[str] = "general"
    pairs: ClassVar[tuple[str, ...]] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """See `Check`."""
        return (self.probe,)

    def judge(self, evidence: Evidence) -> Finding:
        """See `Check`."""
        before, after = (math.log(perplexity(one[self.probe])) for one in (evidence.base, evidence.plug_in))
        return Finding(
            check=self.name,
            holds=after - before <= self.most,
            reason=f"on {self.probe} the plug-in's loss is {after - before:+.3f} nats a token from the base's; at most "
            f"{self.most:+g} is asked for",
        )
