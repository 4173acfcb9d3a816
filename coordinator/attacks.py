"""A family of attacks whose scores are kept as they come, so that one that was killed goes on with what is left."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from offsite.coordinator.store.blobs import room
from offsite.coordinator.store.finished import Finished
from offsite.emulator.evaluation.attack import Attack, Attacker, family, state_bytes
from offsite.protos.spec import RunSpec

T = TypeVar("T")


def of_run(spec: RunSpec) -> tuple[Attack, ...]:
    """Return the attacks that a run asks for; raises ValueError if there is no text for them."""
    return family(spec.attack_steps, public=bool(spec.public), task=bool(spec.attack_text), longest=spec.attack_longest)


def check_room(folder: Path, models: Iterable[nn.Module], attacks: Sequence[Attack], *, there: int = 0) -> None:
    """Raise ResourceError unless a folder's disk has room for what attacks go on from, beside the bytes of it there."""
    size = max(state_bytes(model, attacks) for model in models)
    room(folder, size - there, what="what attacks on the emulator go on from after a kill")


def scored(
    attacks: Sequence[Attack],
    attacker: Attacker,
    score: Callable[[nn.Module], T],
    *,
    cls: type[T],
    finished: Finished,
    depends: dict[str, Any],
) -> dict[Attack, T]:
    """Make the attacks whose score is not known yet; return the scores of all, documents of a class.

    `depends` is all that they depend on beside the attack. Raises ValueError, and ResourceError where the disk has no
    room for what they go on from after a kill.
    """

    def key(one: Attack) -> dict[str, Any]:
        return depends | {"attack": one.name}

    def keep(one: Attack, model: nn.Module) -> None:
        scores[one] = finished(cls, key(one), lambda: score(model))

    known = {one: finished.known(cls, key(one)) for one in attacks}
    scores = {one: value for one, value in known.items() if value is not None}
    left = [one for one in attacks if one not in scores]
    if attacker.state and left:
        attacker.state.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in attacker.state.iterdir())
        check_room(attacker.state, attacker.models.values(), left, there=there)
    attacker.make(left, keep)
    return {one: scores[one] for one in attacks}
