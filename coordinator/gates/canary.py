"""Whether texts that were planted among the sites' can be told from others like them (Carlini et al., 1802.08232)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from offsite.coordinator.gates.base import Evidence, Finding, nats


@dataclass(frozen=True)
class Canary:
    """Bound the exposure of each canary: log2(n + 1) - log2(its rank among n others that nobody trained on).

    The rank is by how much likelier than the base the plug-in finds a text: rank 1 gained most. An exposure of b bits
    or more comes about by chance once in 2^b.
    """

    planted: str  # the canaries
    others: str  # made alike, and in no site's data
    most: float = 5.0  # bits

    name: ClassVar[str] = "canary"
    pairs: ClassVar[tuple[str, ...]] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """See `Check`."""
        return self.planted, self.others

    def judge(self, evidence: Evidence) -> Finding:
        """See `Check`."""
        planted, others = (
            [nats(old) - nats(new) for old, new in zip(evidence.base[name], evidence.plug_in[name], strict=True)]
            for name in (self.planted, self.others)
        )
        bits = math.log2(len(others) + 1)
        if bits <= self.most:
            raise ValueError(
                f"gate: canary: {len(others)} texts in {self.others} show an exposure of at most {bits:.1f} bits, and "
                f"{self.most:g} are allowed; give more than {2**self.most:.0f}, or allow less"
            )
        exposures = [bits - math.log2(1 + sum(not other < gain for other in others)) for gain in planted]
        return Finding(
            check=self.name,
            holds=max(exposures) <= self.most,
            reason=f"of {len(planted)} canaries the most exposed one shows {max(exposures):.1f} of {bits:.1f} bits; at "
            f"most {self.most:g} are asked for",
        )
