"""A family of attacks whose scores are kept as they come, so that one that was killed goes on with what is left."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from offsite.coordinator.store.finished import Finished
from offsite.emulator.evaluation.attack import Attack, Attacker

T = TypeVar("T")


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

    `depends` is all that they depend on beside the attack. Raises ValueError.
    """

    def key(one: Attack) -> dict[str, Any]:
        return depends | {"attack": one.name}

    def keep(one: Attack, model: nn.Module) -> None:
        scores[one] = finished(cls, key(one), lambda: score(model))

    known = {one: finished.known(cls, key(one)) for one in attacks}
    scores = {one: found for one, found in known.items() if found is not None}
    attacker.make([one for one in attacks if one not in scores], keep)
    return {one: scores[one] for one in attacks}
