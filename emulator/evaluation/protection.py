"""What an owner may say of an emulator's protection: how far attacks on it stay behind what the owner keeps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from offsite.emulator import modality


@dataclass(frozen=True)
class Reach:
    """What an attacked emulator reaches on the task's held-out text and on general text."""

    task: modality.Score
    general: modality.Score


@dataclass(frozen=True)
class Protection:
    """How far the attacks stay behind what the owner keeps, in nats a token; the least over all attacks."""

    task: float  # ln ppl(attack) - ln ppl(plug-in) on the task's text
    general: float  # ln ppl(attack) - ln ppl(base) on general text
    threshold: float | None
    label: Literal["protected", "not protected"]
    reason: str

    @property
    def margin(self) -> float:
        """The smaller of the two."""
        return min(self.task, self.general)


def protection(
    attacks: Mapping[str, Reach], *, plug_in: modality.Score, base: modality.Score, threshold: float | None = None
) -> Protection:
    """Judge an emulator by the attacks on it; only a stated threshold (nats) that every margin reaches protects.

    `plug_in` is of the task's text, `base` of general text. Raises ValueError if there is no attack, if one has no
    finite likelihood, as an attack that failed shows nothing, and unless the threshold is positive.
    """
    if not attacks:
        raise ValueError("protection is measured by attacks, and none was given")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"the threshold of protection is in nats and must be positive, got {threshold}")
    task = {name: _mean(reach.task, name) - _mean(plug_in, "plug-in") for name, reach in attacks.items()}
    general = {name: _mean(reach.general, name) - _mean(base, "base") for name, reach in attacks.items()}
    least = min(task.values()), min(general.values())
    summary = "; ".join(
        [_sentence(task, "the plug-in on the task's text"), _sentence(general, "the base on general text")]
    )
    if threshold is None:
        return Protection(*least, None, "not protected", f"no threshold was stated; {summary}")
    if min(least) < threshold:
        return Protection(*least, threshold, "not protected", f"the stated {threshold:g} nats are not kept; {summary}")
    reason = f"every attack made ({', '.join(attacks)}) stays behind by the stated {threshold:g} nats; {summary}"
    return Protection(*least, threshold, "protected", reason)


def _mean(score: modality.Score, whose: str) -> float:
    mean = score.mean
    if not math.isfinite(mean):
        raise ValueError(f"{whose}: the likelihood is {mean} nats a token, which shows nothing; measure it anew")
    return mean


def _sentence(margins: Mapping[str, float], what: str) -> str:
    name = min(margins, key=margins.__getitem__)
    if margins[name] < 0:
        return f"the attack {name!r} is better than {what}, by {-margins[name]:.2f} nats"
    return f"the attack {name!r} comes within {margins[name]:.2f} nats of {what}"
