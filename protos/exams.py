"""What sites tell of the rows that they hold out, and how well it foretells the plug-in.

It is sums alone, which add up to those of all rows together.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from offsite.protos.documents import document, to_plain
from offsite.protos.figures import Score
from offsite.protos.ranges import Finite, Flag, Positive


@document
class Exam:
    """How well a site's held-out rows were predicted by what it received, and by what it has made of that.

    With noise each row counts as one, by the mean of its tokens: a sum with noise is over rows, not over tokens.
    """

    rows: Positive
    before: Score  # the emulator with the adapter that the round begins with
    after: Score | None = None  # with the site's own, trained; None: nothing was trained
    noised: Flag = False


def total(scores: Iterable[Score]) -> Score:
    """Return the sum of scores."""
    known = list(scores)
    likely = [score.nll for score in known if score.nll is not None]
    return Score(
        nll=sum(likely) if len(likely) == len(known) else None,
        tokens=sum(score.tokens for score in known),
    )


def nats(score: Score) -> float | None:
    """Return the mean negative log-likelihood of a token; None where it is no number, or there is no token."""
    return score.nll / score.tokens if score.nll is not None and score.tokens else None


@document
class Gains:
    """How much less a version loses than what the run began with, in nats a token: more is better."""

    round: Positive  # that ended in the version
    emulator: Finite  # at the sites, on the rows that they hold out
    plug_in: Finite  # at the owner, on its own sets


ENOUGH = 3  # versions, of which a correlation says something


def prediction(gains: Sequence[Gains]) -> dict[str, Any]:
    """Say how well what sites gain on the emulator tells what the plug-in gains, where the owner can measure both.

    "correlation" is Pearson's over versions, None of fewer than ENOUGH or where one of the two stays as it is; "agree"
    is in how many both gain or both lose; "warning" is empty unless the sites' gains mislead.
    """
    agree = sum((one.emulator > 0) == (one.plug_in > 0) for one in gains)
    correlation = _correlation(gains) if len(gains) >= ENOUGH else None
    told: dict[str, Any] = {"versions": [to_plain(one) for one in gains], "agree": agree, "correlation": correlation}
    if not gains:
        why = "no version was measured both at the sites and on the owner's own sets"
        return told | {"reason": f"whether the sites' gains foretell the plug-in's is not known: {why}", "warning": ""}
    last = gains[-1]
    signs = {one > 0 for one in (last.emulator, last.plug_in)}
    how = "one gains and the other loses" if len(signs) > 1 else "both gain" if True in signs else "neither gains"
    reason = (
        f"after round {last.round} {how}: {last.emulator:+.3f} nats a token on the emulator at the sites, "
        f"{last.plug_in:+.3f} by the plug-in on the owner's sets"
    )
    if correlation is not None:
        reason += f"; over {len(gains)} versions their correlation is {correlation:.2f}, and the sign is one in {agree}"
    elif len(gains) > 1:
        reason += f"; the sign is one in {agree} of {len(gains)} versions, too few or too alike for a correlation"
    misled = len(signs) > 1 or (correlation is not None and correlation < 0)
    warning = (
        f"what the sites gain on the emulator does not foretell what the plug-in gains: {reason}" if misled else ""
    )
    return told | {"reason": reason, "warning": warning}


def _correlation(gains: Sequence[Gains]) -> float | None:
    try:
        return statistics.correlation([one.emulator for one in gains], [one.plug_in for one in gains])
    except statistics.StatisticsError:  # one of the two is constant
        return None
