"""Tasks that are known by what their rows are like, so that it can be told whose adapter a row is for."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from offsite.emulator import methods
from offsite.emulator.methods.base import Adapter
from offsite.emulator.modality import Batch, Sample
from offsite.emulator.routing import Telling, route

DOCUMENT, SUMS = "tasks.json", "tasks.safetensors"


@dataclass(frozen=True)
class Tasks:
    """Tasks by the sums that sites measured, with a method that tells rows by themselves."""

    method: Telling
    sums: Mapping[str, Adapter]

    def nearest(self, batch: Batch) -> list[str]:
        """Return for each row of a batch the task whose rows it is most like."""
        return route(self.method, nn.Identity(), {}, batch, self.sums)

    def apart(self, batches: Iterable[Batch]) -> dict[str, list[Sample]]:
        """Return the samples of batches by the task that each is nearest to."""
        parts: dict[str, list[Sample]] = {}
        for batch in batches:
            for sample, task in zip(batch.samples, self.nearest(batch), strict=True):
                parts.setdefault(task, []).append(sample)
        return parts

    def save(self, directory: Path) -> None:
        """Write the sums, and what measured them."""
        settings: Any = self.method  # a dataclass, as all plug-ins are
        document = {"method": settings.name, "settings": asdict(settings)}
        (directory / DOCUMENT).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        own = {
            f"{task}/{key}": one.contiguous() for task, sums in sorted(self.sums.items()) for key, one in sums.items()
        }
        save_file(own, directory / SUMS, metadata={"format": "pt"})

    @classmethod
    def load(cls, directory: Path) -> "Tasks":
        """Read what `save` wrote, as a run publishes it; raises ValueError if it is not that."""
        try:
            document, tensors = json.loads((directory / DOCUMENT).read_text()), load_file(directory / SUMS)
            method: Any = methods.make(document["method"], document["settings"])
            sums: dict[str, Adapter] = {}
            for name, tensor in tensors.items():
                task, _, key = name.partition("/")
                sums.setdefault(task, {})[key] = tensor
            for one in sums.values():
                method.parts(one)  # refuses sums that are none of the method's
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(
                f"{directory}: expected {DOCUMENT} with a method that tells tasks apart, and {SUMS} with the sums of "
                f"each, but {type(error).__name__}: {error}"
            ) from None
        return cls(method, sums)
