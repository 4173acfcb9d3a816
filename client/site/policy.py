"""The site's own policy: what may run on its machines. Nothing the coordinator sends can widen it.

A field that is left out of the file has the safe value; the sentences beside the fields are those that `join` shows.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from re import fullmatch
from typing import Annotated, Any, Literal

from pydantic import Field

from offsite.emulator import retention
from offsite.emulator.catalogue import METHODS, RETENTIONS
from offsite.emulator.examples import Source
from offsite.emulator.retention import Rehearsing
from offsite.protos import upload
from offsite.protos.documents import document, from_toml, nearest
from offsite.protos.errors import InputError, MismatchError, RefusedError
from offsite.protos.ranges import AboveZero, AtLeastZero, Count, Digest, Flag, Place, Positive, Word
from offsite.protos.spec import METHOD, Manifest, Ratio, TaskSpec

MIB = 1 << 20
WARM = 3 / 4  # of its steps is what a round whose rate rises to the end counts as at least

Bases = Annotated[tuple[Digest, ...], Field(max_length=1024, description="base models to work for, by digest, or any")]
Folders = Annotated[
    tuple[Place, ...],
    Field(max_length=256, description="folders whose files may be trained on; no link leads out of them"),
]


def _bound(default: Any, why: str) -> Any:
    return Field(default=default, description=why)


@document
class Policy:
    """Bounds of one site; a TOML file with these keys."""

    bases: Bases
    data: Folders
    methods: Annotated[tuple[Word, ...], Field(max_length=64)] = _bound((METHOD.name,), "what may be trained")
    min_steps: Positive = _bound(4, "steps of every round; an update of one or two is the gradient, which is the text")
    max_steps: Positive = _bound(200, "steps of a round")
    min_batch_size: Positive = _bound(4, "sequences of a step; the fewer, the more an update says of each")
    max_batch_size: Positive = _bound(64, "sequences of a step")
    min_rows: Positive = _bound(12, "distinct sequences in every round; an update of few copies tells those few")
    max_passes: AboveZero = _bound(4.0, "passes over the distinct sequences in a run; what is seen often is memorised")
    max_learning_rate: AboveZero = _bound(5e-3, "the higher, the more is memorised")
    min_gradient_clipping: AboveZero = _bound(1e-3, "clipped to almost nothing, a step hands over the gradient")
    min_length: Positive = _bound(32, "tokens at which sequences may be cut; shorter ones hold few words to tell apart")
    max_length: Positive = _bound(4096, "tokens of a sequence")
    max_rounds: Positive = _bound(20, "rounds of a run, with those of the runs that it goes on from")
    min_noise: AtLeastZero = _bound(0.0, "of the change's rms, added before an update leaves; 0: none is asked for")
    max_upload_mib: AboveZero = _bound(64.0, "size of an update")
    max_bundle_mib: AboveZero = _bound(4096.0, "size of an emulator")
    per_step_metrics: Flag = _bound(False, "whether the loss of every step leaves, or one mean a round")
    # One above the vocabulary's size, which is what guessing has, is only a warning where no bound is set, for
    # emulators with few layers left have it too and teach nevertheless.
    max_emulator_perplexity: Ratio | None = _bound(
        None, "of an emulator on this site's text; none: any, with a warning"
    )
    # As open as a second round, which nobody can derive from a seed either: a site that wants neither allows one round.
    continued: Flag = _bound(True, "runs that go on from another run's adapter, as later rounds do from the last one's")
    retentions: Annotated[tuple[Word, ...], Field(max_length=64)] = _bound(
        ("any",), "what may hold training to what earlier runs have learned, by name, or any"
    )
    usage: Flag = _bound(False, "whether memory, processor and GPU use of what trains leave")
    logs: Flag = _bound(False, "whether the last lines of a trainer's log leave; an error in them may quote the data")
    approve: Literal["none", "first", "each"] = _bound(
        "none", "what waits for a person here: nothing, the first task of what a run asks for, or every round's"
    )
    replay_rows: Count = _bound(
        0, "rows of a run that are kept on this disk for later ones to rehearse, and never sent"
    )
    held_out: Count = _bound(
        16, "rows that never train, to measure emulators on; none of fewer than five times as many; 0: none"
    )
    figures: Literal["send", "noise", "withhold"] = _bound(
        "send", "what leaves of how well held-out rows are predicted: all in one figure, that with noise, or nothing"
    )
    min_held_out: Positive = _bound(10, "held-out rows; of fewer no figure leaves")
    figure_epsilon: AboveZero = _bound(
        1.0, "of the differential privacy of a held-out row in one figure with noise; those of all figures add up"
    )
    suspicious: Literal["refuse", "warn"] = _bound("refuse", "emulators with signs of being made to leak")
    odd_rows: Literal["skip", "refuse"] = _bound("skip", "rows that cannot be learned from; both say which")
    columns: Annotated[dict[Word, Word], Field(max_length=16)] = Field(
        default_factory=dict, description="columns by names of this site's, each read as one of docs/data.md"
    )
    keep_bundles_mib: AboveZero = _bound(8192.0, "emulators kept on this disk for later rounds; the oldest go first")
    keep_days: AboveZero = _bound(14.0, "what is downloaded or left out of updates is kept so long after its last use")

    def __post_init__(self) -> None:
        """Refuse what allows nothing: an unknown method, or a smallest value above the largest."""
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods: there is no method {method!r}; {nearest(method, list(METHODS))}")
        for one in self.retentions:
            if one not in ("any", *RETENTIONS):
                raise ValueError(f"retentions: there is no {one!r}; {nearest(one, list(RETENTIONS))}")
        for name in ("steps", "batch_size", "length"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least > most:
                raise ValueError(f"min_{name} = {least} is more than max_{name} = {most}, so that nothing is allowed")

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file, whose relative folders are beside it; raises InputError naming the file and the field."""
        policy = from_toml(cls, path)
        folders = [path.absolute().parent / Path(folder).expanduser() for folder in policy.data]
        for folder in folders:
            if not folder.is_dir():
                raise InputError(f"{path}: data: {folder} is not a folder")
        return replace(policy, data=tuple(str(folder.resolve()) for folder in folders))

    @property
    def tells(self) -> bool:
        """Whether the site measures on held-out rows, and lets something of that out."""
        return self.held_out > 0 and self.figures != "withhold"

    def source(self, data: Path) -> Source:
        """Return where rows are, and how they are read here."""
        folders = [Path(folder) for folder in self.data]
        return Source(data, folders=folders, odd_rows=self.odd_rows, columns=self.columns)

    def check_data(self, data: Path) -> None:
        """Raise RefusedError unless the data lies in an allowed folder; links are followed first."""
        resolved = data.resolve()
        if not any(resolved.is_relative_to(Path(folder).resolve()) for folder in self.data):
            where = ", ".join(self.data) or "no folder"
            raise RefusedError(f"{data}: the policy allows data only in {where}", reason="BOUND_DATA")

    def check_task(self, task: TaskSpec) -> None:
        """Raise RefusedError naming the first bound a task goes beyond, InputError for a stage that is not known."""
        training = task.training
        if "any" not in self.bases and task.base not in self.bases:
            raise refusal("bases", f"base {task.base} is not among those allowed")
        if task.method.name not in self.methods:
            raise refusal("methods", f"method {task.method.name} is not among {', '.join(self.methods)}")
        if task.continues and not self.continued:
            raise refusal("continued", f"the run goes on from round {task.continues.round} of {task.continues.run}")
        if task.round >= task.rounds and not task.examines:
            raise refusal("max_rounds", f"round {task.round + 1} of a run of {task.rounds}")
        for bound, value, what in (
            ("steps", training.steps, "steps a round"),
            ("batch_size", training.batch_size, "sequences a step"),
            ("learning_rate", training.learning_rate, "learning rate"),
            ("gradient_clipping", training.gradient_clipping, "norm that gradients are clipped to"),
            ("length", training.max_length, "tokens a sequence"),
            ("rounds", task.rounds_before + task.rounds, "rounds of a run and of those it goes on from"),
        ):
            least, most = getattr(self, f"min_{bound}", value), getattr(self, f"max_{bound}", value)
            if value < least:
                raise refusal(f"min_{bound}", f"{what}: {value:g} asked for, at least {least:g} allowed")
            if value > most:
                raise refusal(f"max_{bound}", f"{what}: {value:g} asked for, at most {most:g} allowed")
        self._check_retention(task)
        stages = upload.make(task.upload)
        noise = max((stage.noise for stage in stages), default=0.0)
        if noise < self.min_noise:
            raise refusal(
                "min_noise", f"noise on the update: {noise:g} of the change's rms, at least {self.min_noise:g}"
            )
        self.check_update(task.update_size)

    def check_rehearsal(self, task: TaskSpec, *, old: int, kept: int) -> None:
        """Raise RefusedError for a run that sees rows of earlier ones too often: `old` of a step, of so many kept."""
        passes = task.rounds * task.training.steps * old / kept
        if passes > self.max_passes:
            what = f"{passes:.3g} passes over {kept} sequences that were kept of earlier runs"
            raise refusal("max_passes", f"{what} are more than {self.max_passes:g}")

    def _check_retention(self, task: TaskSpec) -> None:
        name = task.training.retention.name
        held = retention.make(name, task.training.retention.settings)
        if isinstance(held, Rehearsing) and held.rows > self.replay_rows:
            raise refusal("replay_rows", f"{held.rows} rows of a run to keep, at most {self.replay_rows} allowed")
        if "any" not in self.retentions and name not in self.retentions:
            raise refusal("retentions", f"retention {name} is not among {', '.join(self.retentions)}")
        if task.anchor_size > self.max_bundle_mib * MIB:
            what = f"what training is held to, of {task.anchor_size / MIB:.0f} MiB,"
            raise refusal("max_bundle_mib", f"{what} is more than {self.max_bundle_mib:g}")

    def check_rows(self, task: TaskSpec, *, seen: int, distinct: int) -> None:
        """Raise RefusedError for a round that sees too few distinct sequences, or a run that sees them too often."""
        if seen < self.min_rows:
            raise refusal(
                "min_rows", f"the round sees {seen} distinct sequences of this site, fewer than {self.min_rows}"
            )
        rounds = task.rounds_before + task.rounds
        passes = rounds * task.training.steps * task.training.batch_size / distinct
        if passes > self.max_passes:
            what = f"{passes:.3g} passes over {distinct} distinct sequences in {rounds} rounds"
            raise refusal("max_passes", f"{what} are more than {self.max_passes:g}")

    def check_shares(self, shares: Sequence[float]) -> None:
        """Raise RefusedError for a learning rate that falls so fast that a round is one of few steps after all.

        Its steps are counted by Kish's effective number, (sum s)^2 / sum s^2 of their shares of the rate (Survey
        Sampling, 1965). A warm-up alone leaves three quarters of them or more, so that many of `min_steps` are enough.
        """
        count = sum(shares) ** 2 / sum(share * share for share in shares)
        least = WARM * self.min_steps
        if count < least:
            what = f"steps a round, by their shares of the learning rate: {len(shares)} count as {count:.3g}"
            raise refusal("min_steps", f"{what}, at least {least:g} allowed")

    def check_bundle(self, task: TaskSpec, manifest: Manifest) -> None:
        """Raise RefusedError for a bundle that is too large, MismatchError for one that is not what the task says."""
        size = sum(entry.size for entry in manifest.files) / MIB
        if size > self.max_bundle_mib:
            raise refusal("max_bundle_mib", f"a bundle of {size:.0f} MiB is more than {self.max_bundle_mib:g}")
        if manifest.base.digest != task.base:
            raise MismatchError(f"the bundle is of base {manifest.base.digest}, the task of {task.base}")
        if bad := [layer for layer in manifest.trainable if layer not in manifest.layers]:
            raise MismatchError(f"the bundle trains layers {bad} that it does not hold")
        for entry in manifest.files:
            parts = entry.path.split("/")
            if entry.path.endswith(".py") or not all(fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", p) for p in parts):
                raise MismatchError(f"the bundle names a file that it must not: {entry.path!r}")

    def check_update(self, size: int) -> None:
        """Raise RefusedError for an update that is larger than the site lets out."""
        if size > self.max_upload_mib * MIB:
            raise refusal("max_upload_mib", f"an update of {size / MIB:.1f} MiB is more than {self.max_upload_mib:g}")

    def describe(self) -> list[tuple[str, str, str]]:
        """Return a (field, value, sentence) row of every field, for people."""
        cls: Any = type(self)
        return [
            (field.name, _shown(getattr(self, field.name)), cls.__pydantic_fields__[field.name].description)
            for field in fields(cls)
        ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{old}: as {new}" for old, new in value.items()) or "none"
    if isinstance(value, tuple):
        return "\n".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value if value is not None else "none")


def refusal(bound: str, why: str) -> RefusedError:
    """Return the error of a task, or of its emulator, that goes beyond the policy's field of this name."""
    return RefusedError(f"this site's policy refuses the task ({bound}): {why}", reason=f"BOUND_{bound.upper()}")
