"""The site's own policy: what may run on its machines. Nothing the coordinator sends can widen it."""

from pathlib import Path
from re import fullmatch
from typing import Annotated, Literal

from pydantic import Field

from offsite.protos.documents import document, from_toml
from offsite.protos.errors import InputError, MismatchError, RefusedError
from offsite.protos.spec import Manifest, TaskSpec

MIB = 1 << 20


@document
class Policy:
    """Bounds of one site; a TOML file with these keys."""

    bases: tuple[str, ...]  # digests of models the site works for; "any" allows every one
    data: tuple[str, ...]  # folders whose files may be trained on
    methods: tuple[str, ...] = ("lora",)
    max_steps: Annotated[int, Field(ge=1)] = 1000  # optimiser steps in one round
    min_steps: Annotated[int, Field(ge=1)] = 1  # the update of few steps is nearly a gradient, which gives text away
    # Clipped to far below AdamW's epsilon, a step is linear in the gradient, and an update hands it over.
    min_gradient_clipping: Annotated[float, Field(gt=0)] = 1e-3
    max_batch_size: Annotated[int, Field(ge=1)] = 1024  # sequences of one step
    max_length: Annotated[int, Field(ge=1)] = 131072  # tokens of one sequence
    max_rounds: Annotated[int, Field(ge=1)] = 100  # rounds of one run
    max_upload_mib: Annotated[float, Field(gt=0)] = 64.0  # size of one update
    max_bundle_mib: Annotated[float, Field(gt=0)] = 65536.0  # size of one emulator
    # Perplexity of an emulator on the site's own text. None: one above the vocabulary's size, which is what guessing
    # has, is only a warning, for emulators with few layers left have it too and teach nevertheless.
    max_emulator_perplexity: Annotated[float, Field(gt=1)] | None = None
    suspicious: Literal["refuse", "warn"] = "refuse"  # what to do with signs of an emulator made to leak
    odd_rows: Literal["skip", "refuse"] = "skip"  # what to do with rows that cannot be learned from; both say them

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file; raises InputError naming the file and the field."""
        policy = from_toml(cls, path)
        for folder in policy.data:
            if not Path(folder).is_dir():
                raise InputError(f"{path}: data: {folder} is not a folder")
        return policy

    def check_data(self, data: Path) -> None:
        """Raise RefusedError unless the data lies in an allowed folder; links are followed first."""
        resolved = data.resolve()
        if not any(resolved.is_relative_to(Path(folder).resolve()) for folder in self.data):
            raise RefusedError(f"{data}: the policy allows data only in {', '.join(self.data) or 'no folder'}")

    def check_task(self, task: TaskSpec) -> None:
        """Raise RefusedError naming the first bound a task goes beyond."""
        if "any" not in self.bases and task.base not in self.bases:
            raise _refused("bases", f"base {task.base} is not among those allowed")
        if task.method.name not in self.methods:
            raise _refused("methods", f"method {task.method.name} is not among {', '.join(self.methods)}")
        if task.training.steps > self.max_steps:
            raise _refused("max_steps", f"{task.training.steps} steps a round are more than {self.max_steps}")
        if task.training.steps < self.min_steps:
            raise _refused("min_steps", f"{task.training.steps} steps a round are fewer than {self.min_steps}")
        if task.training.gradient_clipping < self.min_gradient_clipping:
            raise _refused("min_gradient_clipping", f"{task.training.gradient_clipping:g} is less than allowed")
        if task.training.batch_size > self.max_batch_size:
            raise _refused("max_batch_size", f"{task.training.batch_size} sequences a step are more than allowed")
        if task.training.max_length > self.max_length:
            raise _refused("max_length", f"{task.training.max_length} tokens a sequence are more than allowed")
        if task.rounds > self.max_rounds:
            raise _refused("max_rounds", f"{task.rounds} rounds are more than {self.max_rounds}")
        self.check_update(task.adapter_size)  # an update is as large as what it starts from

    def check_bundle(self, task: TaskSpec, manifest: Manifest) -> None:
        """Raise RefusedError for a bundle that is too large, MismatchError for one that is not what the task says."""
        size = sum(entry.size for entry in manifest.files) / MIB
        if size > self.max_bundle_mib:
            raise _refused("max_bundle_mib", f"a bundle of {size:.0f} MiB is more than {self.max_bundle_mib:g}")
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
            raise _refused("max_upload_mib", f"an update of {size / MIB:.1f} MiB is more than {self.max_upload_mib:g}")

    def describe(self) -> list[tuple[str, str]]:
        """Return (bound, value) rows for people."""
        return [
            ("models", "any" if "any" in self.bases else "\n".join(self.bases) or "none"),
            ("methods", ", ".join(self.methods)),
            ("data folders", "\n".join(self.data)),
            ("most steps a round", str(self.max_steps)),
            ("largest batch", f"{self.max_batch_size} sequences of {self.max_length} tokens"),
            ("most rounds a run", str(self.max_rounds)),
            ("largest update", f"{self.max_upload_mib:g} MiB"),
            ("largest emulator", f"{self.max_bundle_mib:g} MiB"),
            ("highest perplexity", f"{self.max_emulator_perplexity:g}" if self.max_emulator_perplexity else "any"),
            ("suspicious emulators", "refused" if self.suspicious == "refuse" else "trained on, with a warning"),
            ("odd rows of data", "refused" if self.odd_rows == "refuse" else "left out and counted"),
        ]


def _refused(bound: str, reason: str) -> RefusedError:
    return RefusedError(f"this site's policy refuses the task ({bound}): {reason}")
