"""Versions, and what their tensors are, by the files that hold them; the journal keeps these names."""

from dataclasses import replace

from pydantic import Field

from offsite.coordinator.aggregation.base import KEPT, MEMORY
from offsite.coordinator.store.blobs import Blobs, Stored
from offsite.kernels.schema import Schema
from offsite.protos.documents import document, from_json
from offsite.protos.ranges import Digest, Finite, Line, Tier, Word


@document
class Version:
    """What a run begins from, and what every round ends in; see `aggregation.Version`."""

    adapter: Digest  # what goes into the base
    broadcast: dict[Tier, Stored]  # what the sites of each tier start from
    state: dict[Word, Digest] = Field(default_factory=dict)  # what the owner keeps for later rounds, by its name
    figures: dict[Word, Finite | None] = Field(default_factory=dict)
    sums: dict[Line, dict[str, Finite | None]] = Field(default_factory=dict)  # of a part of it

    @property
    def bare(self) -> "Version":
        """This version as strategies know it; without the state that others keep."""
        return replace(self, state={name: kept for name, kept in self.state.items() if not name.startswith(KEPT)})

    @property
    def memory(self) -> dict[str, str]:
        """Its state that the run's memory keeps."""
        return {name: kept for name, kept in self.state.items() if name.startswith(MEMORY)}

    @property
    def digests(self) -> set[str]:
        """Its files."""
        return {self.adapter, *(sent.digest for sent in self.broadcast.values()), *self.state.values()}


def read_schema(blobs: Blobs, digest: str) -> Schema:
    """Read what the adapters of a run are made of."""
    return from_json(Schema, blobs.path(digest).read_bytes(), where="schema")
