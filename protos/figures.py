"""The figures that tell a tuning's story, and the one way in which likelihoods become the perplexities of them."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offsite.protos.documents import document
from offsite.protos.ranges import Amount, Finite


@dataclass(frozen=True)
class Figure:
    """How a figure is shown."""

    head: str  # over its column
    colour: str  # of its bars and points
    phase: str  # what is done while it is measured

    @property
    def title(self) -> str:
        """Return its name in one line."""
        return self.head.replace("\n", " ")


BASE_ZERO_SHOT = "base_zero_shot"
EMULATOR_ZERO_SHOT = "emulator_zero_shot"
EMULATOR_TUNED = "emulator_tuned"
PLUG_IN = "plug_in"
BASE_TUNED = "base_tuned"  # the bound
ATTACK = "attack"
FIGURES = {  # by their names in steps, events and reports, in the order in which they are shown
    BASE_ZERO_SHOT: Figure("base\nzero-shot", "#8c96a3", "measuring the base"),
    EMULATOR_ZERO_SHOT: Figure("emulator\nzero-shot", "#e0b37a", "measuring the emulator"),
    EMULATOR_TUNED: Figure("emulator\ntuned", "#c8803c", "measuring the tuned emulator"),
    PLUG_IN: Figure("plug-in", "#1b7f5c", "measuring the plug-in"),
    BASE_TUNED: Figure("base\ntuned", "#3f6fb5", "tuning the base itself"),
    ATTACK: Figure("attack", "#b5473f", "attacking the emulator"),
}


def title(figure: str) -> str:
    """Return a figure's name as people read it, "plug_in:2" as that after round 2."""
    name, _, number = figure.partition(":")
    known = FIGURES[name].title if name in FIGURES else name.replace("_", " ")  # of another version
    return f"{known} after round {number}" if number else known


@document
class Score:
    """How well the tokens of a text were predicted."""

    nll: Finite | None  # sum of the negative log likelihoods, in nats; None: it is no finite number
    tokens: Amount


def total(scores: Iterable[Score]) -> Score:
    """Return the score of several texts together."""
    known = list(scores)
    nll = [score.nll for score in known if score.nll is not None]
    return Score(nll=sum(nll) if len(nll) == len(known) else None, tokens=sum(score.tokens for score in known))


def perplexity(scores: Iterable[Score]) -> float:
    """Perplexity over all tokens of several texts; capped where floats end.

    NaN where nothing was predicted, or a likelihood is no finite number.
    """
    known = list(scores)
    nll = sum(math.nan if score.nll is None else score.nll for score in known)
    tokens = sum(score.tokens for score in known)
    return math.exp(min(nll / tokens, 700.0)) if tokens else math.nan


FAR = 2.0  # times the base's perplexity: tuning that does such harm has gone wrong
WORSE = {  # than: what training must not do, and what it means for the figure
    (BASE_TUNED, BASE_ZERO_SHOT): "training made the base itself worse, so this bounds nothing",
    (EMULATOR_TUNED, EMULATOR_ZERO_SHOT): "training made the emulator worse",
    (ATTACK, EMULATOR_ZERO_SHOT): "training made the emulator worse, so this attacks nothing",
}

# One that is no larger than so many times another: which of them is not what it is called then, and what it is.
AS_GOOD = (
    (EMULATOR_TUNED, 1.02, PLUG_IN, EMULATOR_TUNED, "sites hold what is as good as the plug-in: nothing is protected"),
    (
        PLUG_IN,
        0.99,
        BASE_TUNED,
        BASE_TUNED,
        "the plug-in is better, so this is no bound: the base was tuned too little",
    ),
    (EMULATOR_TUNED, 0.99, ATTACK, ATTACK, "the emulator tuned as asked is better, so this attack tells nothing"),
    (
        EMULATOR_ZERO_SHOT,
        0.99,
        BASE_ZERO_SHOT,
        EMULATOR_ZERO_SHOT,
        "the base is worse: the held-out text is too little",
    ),
)


def doubts(row: Mapping[str, float | None], *, vocabulary: int | None = None) -> dict[str, str]:
    """Say of each perplexity of one tuning that cannot be right why not; `vocabulary` is the number of tokens."""
    known = {name: value for name, value in row.items() if value is not None}
    reasons = {name: "it is no finite number" for name, value in known.items() if not math.isfinite(value)}
    if vocabulary:
        reasons |= {
            name: f"guessing among {vocabulary:,} tokens does better"
            for name, value in known.items()
            if name not in reasons and value > vocabulary
        }
    for (name, than), why in WORSE.items():
        if name in known and name not in reasons and known[name] > known.get(than, math.inf):
            reasons[name] = f"{why}; a lower learning rate may help"
    base, plug_in = known.get(BASE_ZERO_SHOT, math.inf), known.get(PLUG_IN, 0.0)
    if PLUG_IN not in reasons and plug_in > FAR * base:
        reasons[PLUG_IN] = f"it is {plug_in / base:.0f} times the untuned base's; a lower learning rate may help"
    return reasons


def remarks(row: Mapping[str, float | None]) -> dict[str, str]:
    """Say of each perplexity of one tuning that may be right, but is not what it is called, what it is.

    Of an emulator that is the base itself, as in plain federated training, nothing is said.
    """
    known = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
    if known.get(BASE_ZERO_SHOT, -1.0) == known.get(EMULATOR_ZERO_SHOT):
        known.pop(EMULATOR_TUNED, None)
    return {
        marked: why
        for better, factor, worse, marked, why in AS_GOOD
        if better in known and worse in known and known[better] <= factor * known[worse]
    }


def marks(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Say of each figure of a report that cannot be right, or is not what it is called, why not.

    By place: "overall" or "sites.<name>".
    """
    places = {"overall": report["overall"], **{f"sites.{name}": row for name, row in report["sites"].items()}}
    reasons = {place: remarks(row) | doubts(row, vocabulary=report.get("vocabulary")) for place, row in places.items()}
    return {place: one for place, one in reasons.items() if one}


def sentences(row: Mapping[str, float | None], *, vocabulary: int | None = None, of: Container[str]) -> list[str]:
    """Return warnings of some figures of a tuning."""
    wrong = doubts(row, vocabulary=vocabulary)
    said = {name: f"cannot be right: {why}" for name, why in wrong.items()}
    said |= {name: f"is not what it is called: {why}" for name, why in remarks(row).items() if name not in wrong}
    return [f"the figure '{title(name)}' {why}" for name, why in said.items() if name in of]


def without_infinities(value: Any, place: str = "") -> tuple[Any, list[str]]:
    """Return plain data as JSON can hold it, null for infinities and NaN, and the places where these were."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, [place]
    if not isinstance(value, dict | list | tuple):
        return value, []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = {key: without_infinities(one, f"{place}.{key}".lstrip(".")) for key, one in items}
    places = [one for _, inner in parts.values() for one in inner]
    whole = {key: one for key, (one, _) in parts.items()}
    return (whole if isinstance(value, dict) else list(whole.values())), places


def protection(
    overall: Mapping[str, float], attacks: Sequence[str] = (), *, task: bool, tuned_on: str
) -> dict[str, Any]:
    """Say in a run's report what attacks on its emulator showed; a run states no threshold, so nothing is claimed.

    Args:
        overall: the figures over all texts, "attack" that of the strongest attack.
        attacks: what was done in each, the strongest first.
        task: whether an attack had text of the task.
        tuned_on: the text that the base itself was tuned on, where it was.

    "margin" is how far the best that a site can have stays behind the plug-in, "lost" how far that stays behind tuning
    on the base, in nats a token; None where it was not measured.
    """
    plug_in = _nats(overall, PLUG_IN)
    reached = {name: nats for name in (ATTACK, EMULATOR_TUNED) if (nats := _nats(overall, name)) is not None}
    bound = _nats(overall, BASE_TUNED)
    if bound is None or plug_in is None:
        lost, beside = None, "what tuning the base itself gives was not measured"
    else:
        lost = plug_in - bound
        beside = f"the plug-in is {_behind(lost)} the base itself tuned on {tuned_on}"
    verdict = {"label": "not protected", "margin": None, "lost": lost}
    if not attacks:
        return verdict | {"reason": f"no attack on the emulator was asked for, so none was measured; {beside}"}
    if plug_in is None or ATTACK not in reached:
        return verdict | {"reason": f"the attack's figure or the plug-in's is no finite number; {beside}"}
    margin = min(reached.values()) - plug_in
    which = f"the strongest of {len(attacks)} attacks" if len(attacks) > 1 else "the one attack that was made"
    clauses = [
        f"no threshold was stated; {which} ({attacks[0]}) brings the emulator to perplexity {overall['attack']:.2f}, "
        f"{_behind(reached['attack'] - plug_in)} the plug-in"
    ]
    if margin < reached[ATTACK] - plug_in:
        clauses.append(f"the emulator tuned as asked is stronger than that, {_behind(margin)} the plug-in")
    if not task:
        clauses.append("there was public text alone, and a site, which has the task's, may come further")
    return verdict | {"margin": margin, "reason": "; ".join([*clauses, beside])}


def _nats(overall: Mapping[str, float], figure: str) -> float | None:
    value = overall.get(figure)
    return math.log(value) if value is not None and 0 < value < math.inf else None


def _behind(nats: float) -> str:
    return f"{nats:.2f} nats behind" if nats >= 0 else f"{-nats:.2f} nats ahead of"
