"""The texts of a comparison, encoded once for all candidates."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.coordinator.comparison.plan import Plan
from offsite.emulator import modality
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.examples import Example, paths
from offsite.emulator.modality import Batch, Sample, read
from offsite.protos.chunks import digest_file
from offsite.protos.errors import InputError

EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Texts:
    """What trains, what measures, and what anybody may read."""

    train: list[Sample]
    held_out: list[Batch]
    general: list[Batch]
    public: list[Sample]
    public_path: Path  # the same as a file, for the builders

    @classmethod
    def read(cls, plan: Plan, tokenizer: Any, folder: Path) -> "Texts":
        """Read and encode them; a half of the public text is written into `folder`. Raises InputError."""
        try:
            public_path, public = Path(plan.public), read(Path(plan.public))
            if plan.calibration:
                read(Path(plan.calibration))  # the builders' own, but a fault should show before they begin
            if plan.general:
                general = read(Path(plan.general))
            else:
                half = len(public) // 2
                if half < 1:
                    raise ValueError(f"{plan.public}: one example cannot be halved; give general text")
                public, general = public[:half], public[half:]
                public_path = _write(public, folder / "public.jsonl")

            def encode(examples: Sequence[Example], *, divide: bool = True) -> list[Sample]:
                return modality.encode(examples, tokenizer, max_length=plan.training.max_length, divide=divide)

            return cls(
                train=encode(read(Path(plan.train))),
                held_out=evaluation_batches(encode(read(Path(plan.held_out))), batch_size=EVALUATION_BATCH),
                general=evaluation_batches(encode(general, divide=False), batch_size=EVALUATION_BATCH),
                public=encode(public, divide=False),
                public_path=public_path,
            )
        except ValueError as error:
            raise InputError(str(error)) from error


def digests(plan: Plan) -> dict[str, str]:
    """Digest each file of text, so that a text that changed is not taken for the same; raises system errors."""
    files = {"train": plan.train, "held_out": plan.held_out, "public": plan.public}
    files |= {"calibration": plan.calibration, "general": plan.general}
    entries: dict[str, str] = {}
    for name, text in files.items():
        for file in (file for file, fault in paths(Path(text)) if not fault) if text else ():
            entries[f"{name} {file.relative_to(Path(text).parent)}"] = digest_file(file)
    return entries


def _write(examples: Sequence[Example], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example.row, ensure_ascii=False) + "\n" for example in examples), "utf-8")
    return path
