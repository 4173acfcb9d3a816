"""What sites tell of the rows that they hold out: sums alone, which add up to those of all rows together."""

from collections.abc import Iterable

from offsite.protos.documents import document
from offsite.protos.figures import Score
from offsite.protos.ranges import Flag, Positive


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
