"""A bundle tried out as a site would use it, before it is called done."""

import logging

from torch import nn

from offsite.coordinator.bundles.building import Built, memory
from offsite.emulator import bundle
from offsite.emulator.methods import Adapter, Method, proof
from offsite.emulator.precision import quicken
from offsite.protos.errors import MismatchError

log = logging.getLogger(__name__)


def try_out(built: Built, method: Method) -> None:
    """Load a bundle from its files and take one training step; raises MismatchError. If it is large, that is said."""
    size = sum(entry.size for entry in built.manifest.files)
    if size > memory() / 4:  # computing in fp32 may double it
        log.warning(
            "%s: %.1f GB is too large to load and train it here, so that was not tried", built.folder, size / 1e9
        )
        return
    layout = bundle.described(built.manifest)
    places = layout.outline.places
    try:
        emulator, _ = bundle.load(built.folder, layout=layout, dtype="auto")
        adapter = method.start(emulator, places, seed=0)
    except ValueError as error:
        raise MismatchError(f"the emulator that was built cannot be loaded and trained: {error}") from None
    take_step(emulator, method, places, adapter)


def take_step(emulator: nn.Module, method: Method, places: dict[int, int], adapter: Adapter) -> None:
    """Take one training step with an adapter, which changes the emulator; raises MismatchError."""
    quicken(emulator)
    try:
        proof.step(emulator, method, places, adapter)
    except (ValueError, RuntimeError) as error:
        raise MismatchError(f"the emulator that was built cannot be trained by {method.name}: {error}") from None
