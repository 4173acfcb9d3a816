"""No memory: a version is what the fold gives, and whatever earlier runs remembered is forgotten."""

from typing import ClassVar

from offsite.coordinator.aggregation.base import Version
from offsite.coordinator.memory.base import Combine, Moment
from offsite.kernels.schema import Rule, Schema, Tensors
from offsite.protos.documents import document


@document
class Nothing:
    """Keep nothing."""

    name: ClassVar[str] = "none"
    rules: ClassVar[frozenset[Rule]] = frozenset(Rule)
    accumulates: ClassVar[bool] = False
    paced: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    divides: ClassVar[bool] = False
    combine: ClassVar[Combine] = "one"

    def begin(self, last: Version, start: Version, schema: Schema, moment: Moment) -> Version:
        """Return the version as it is."""
        return last

    def after(self, last: Version, new: Version, schema: Schema, moment: Moment) -> Version:
        """Return what the fold gave."""
        return new

    def experts(self, version: Version) -> dict[str, Tensors]:
        """Return the version's adapter."""
        return {"adapter": version.adapter}
