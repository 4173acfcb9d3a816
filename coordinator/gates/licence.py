"""Whether the base says under which licence it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from huggingface_hub import metadata_load
from yaml import YAMLError

from offsite.coordinator.gates.base import Evidence, Finding, Unprobed

CARD = "README.md"


@dataclass(frozen=True)
class Licence(Unprobed):
    """Ask that the base's model card names a licence, and one of those that are allowed."""

    name: ClassVar[str] = "licence"
    allowed: tuple[str, ...] = ()  # as cards name them, such as "apache-2.0"; empty: any

    def judge(self, evidence: Evidence) -> Finding:
        """See `Check`."""
        stated = evidence.licence
        asked = f"one of {', '.join(self.allowed)}" if self.allowed else "any licence"
        return Finding(
            check=self.name,
            holds=bool(stated) and (not self.allowed or stated in self.allowed),
            reason=f"the base's card ({CARD}) states {stated or 'no licence'}; {asked} is asked for",
        )


def stated(base: Path) -> str:
    """Return the licence that the card in a base's folder states; empty: there is no card, or none in it."""
    try:
        known = metadata_load(base / CARD) or {}
    except (OSError, ValueError, YAMLError):
        return ""
    name = known.get("license")
    return name if isinstance(name, str) else ""
