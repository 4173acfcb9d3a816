"""Which part of a run's adapter trains, as the coordinator knows it: what an update may have, and how large it is."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.results import Built
from offsite.coordinator.runs.versions import read_schema
from offsite.coordinator.store.blobs import Blobs
from offsite.emulator import parts
from offsite.emulator.parts import Allotting, Part, Scoring, Turn
from offsite.kernels.schema import Schema, Tier, only, size_bytes
from offsite.protos import upload
from offsite.protos.spec import TaskSpec, TrainingSpec


def part_of(training: TrainingSpec) -> Part:
    """Return the part of the adapter that trains; raises ValueError for one that is not known, or its settings."""
    return parts.make(training.part.name, training.part.settings)


def turn_of(task: TaskSpec) -> Turn:
    """Return the round of a task's site, as the site has it."""
    return Turn(task.training.seed, task.rounds_before + task.round, task.site)


def at_site(task: TaskSpec, site: str) -> TaskSpec:
    """Return a task of a run as one of its sites is told it: of what each carries, its own alone."""
    part, training = part_of(task.training), task.training
    if isinstance(part, Allotting):
        training = replace(training, part=replace(training.part, settings=part.settings_at(site)))
    return replace(task, site=site, training=training)


def schema_of(task: TaskSpec, schema: Schema, *, chosen: Sequence[int] = ()) -> Schema:
    """Return what of a run's schema an update of a task has; raises ValueError for a choice that no site can make."""
    part = part_of(task.training)
    return only(schema, part.groups(schema, turn_of(task), chosen)) if part.partial or chosen else schema


class UpdateSizes:
    """Bytes of the tensors of updates, as the stages pack them; where sites choose what trains, the most there can be.

    A schema is read when it is first asked for, and of the whole adapter none is.
    """

    def __init__(self, blobs: Callable[[], Blobs], spec: Grant, built: Built) -> None:
        """Take the run; `blobs` opens its files."""
        self._blobs, self._spec, self._built = blobs, spec, built
        self.part = part_of(spec.training)
        self._stages = upload.make(spec.upload)
        self._schemas: dict[Tier, Schema] = {}
        self._known: dict[tuple[Tier, frozenset[str]], int] = {}

    def of(self, tier: Tier, number: int, site: str) -> int:
        """Return the size for a site of a tier in a round of the run, counted from 0."""
        if not self.part.partial:
            return self._built.update_sizes[tier]
        if tier not in self._schemas:
            self._schemas[tier] = read_schema(self._blobs(), self._built.schemas[tier])
        schema = self._schemas[tier]
        turn = Turn(self._spec.training.seed, self._spec.rounds_before + number, site)
        chosen = self.part.largest(schema) if isinstance(self.part, Scoring) else ()
        names = self.part.groups(schema, turn, chosen)
        if (tier, names) not in self._known:
            self._known[tier, names] = size_bytes(upload.schema_of(self._stages, only(schema, names)))
        return self._known[tier, names]
