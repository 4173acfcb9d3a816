"""What a comparison measures and says, as documents: a row for each candidate, then what follows from all rows."""

from typing import Any, Literal

from pydantic import Field

from offsite.emulator.evaluation.attack import Attack
from offsite.protos.documents import document
from offsite.protos.figures import ATTACK, BASE_TUNED, FIGURES, PLUG_IN
from offsite.protos.ranges import Amount, Count, Finite
from offsite.protos.recipes import render
from offsite.protos.spec import Chain, Choice, Layers

FIVE = tuple(name for name in FIGURES if name != ATTACK)
ATTACKS = ("unfreeze", "heal")  # by the last text they train on: the task's, or public text


@document
class Candidate:
    """One way to tune offsite: how the emulator is built, which of its layers train, and what trains in them."""

    builders: Chain
    trainable: Choice
    method: Choice

    @property
    def name(self) -> str:
        """All three as recipes."""
        return f"{render(self.builders)}, {render([self.trainable])}, {render([self.method])}"


@document
class Predicted:
    """How well a text was predicted."""

    nll: Finite  # nats, over all tokens
    tokens: Amount
    perplexity: Finite


@document
class Answered:
    """How many of `n` questions with several choices were answered right, with the standard errors of the shares."""

    accuracy: Finite
    stderr: Finite
    normalised: Finite  # by the choices' lengths in characters
    normalised_stderr: Finite
    n: Amount


@document
class Score:
    """What a model can do: on held-out text of the task, on general text, and at tasks of lm-eval."""

    held_out: Predicted
    general: Predicted
    accuracy: dict[str, Answered] = Field(default_factory=dict)


@document
class Attacked:
    """What one attack made of an emulator."""

    start: Literal["emulator", "tuned"]
    healing: Count  # steps at most, as are the others
    steps: Count
    score: Score

    @property
    def name(self) -> str:
        """What was done."""
        return Attack(self.start, self.healing, self.steps).name

    @property
    def kind(self) -> str:
        """Of ATTACKS."""
        return "unfreeze" if self.steps else "heal"


@document
class ClientStep:
    """What one optimiser step costs a site."""

    flops: Amount
    peak_bytes: Amount  # weights, activations, gradients and moments
    cpu_s: Finite  # of all threads


@document
class Emulated:
    """What was measured of an emulator, whatever trains in it."""

    layers: Layers
    trained: Layers  # layer ids of the base
    zero_shot: Score
    attacks: tuple[Attacked, ...]  # on it as it is handed out
    verbatim: Amount  # parameters of the base that the bundle holds as they are
    lossy: Amount  # and in a format of few bits
    parameters: Amount  # of the base
    bytes: Amount  # of the bundle


@document
class Measured:
    """What was measured of a candidate; no judgement in it."""

    emulated: Emulated
    figures: dict[str, Score]  # the five
    attacks: tuple[Attacked, ...]  # on the tuned emulator
    client: ClientStep  # on the emulator
    full: ClientStep  # LoRA on every layer of the base, in the same run
    seconds: Finite

    @property
    def plug_in(self) -> float:
        """Perplexity of the plug-in on held-out text, by which candidates are compared."""
        return self.figures[PLUG_IN].held_out.perplexity

    @property
    def every_attack(self) -> tuple[Attacked, ...]:
        """All attacks, on the emulator as it is handed out and as it is tuned."""
        return (*self.emulated.attacks, *self.attacks)

    @property
    def strongest(self) -> dict[str, Attacked]:
        """Of each kind of attack the one that predicts held-out text best."""
        return {
            kind: min((one for one in self.every_attack if one.kind == kind), key=lambda one: one.score.held_out.nll)
            for kind in ATTACKS
        }

    @property
    def lost(self) -> float:
        """How far the plug-in stays behind tuning on the base itself, in nats a token."""
        plug_in, bound = self.figures[PLUG_IN].held_out, self.figures[BASE_TUNED].held_out
        return plug_in.nll / plug_in.tokens - bound.nll / bound.tokens

    @property
    def disclosed(self) -> float:
        """Share of the base's parameters that the bundle holds verbatim."""
        return self.emulated.verbatim / self.emulated.parameters


@document
class Protection:
    """How far the best attack stays behind what the owner keeps, and whether that is called protected."""

    margin: Finite  # nats a token
    label: Literal["protected", "not protected"]
    reason: str


@document
class Row:
    """A candidate, and what was found or why nothing was."""

    number: Amount
    label: str  # the parts of its name in which candidates differ
    candidate: Candidate
    fault: str = ""
    measured: Measured | None = None
    protection: Protection | None = None
    warnings: tuple[str, ...] = ()
    frontier: bool = False


@document
class Comparison:
    """The whole report."""

    format: Literal[1] = 1
    model: str
    base: dict[str, Any]
    settings: dict[str, Any]  # what all candidates have in common
    public: str  # the file of public text that the emulators were built with
    rows: tuple[Row, ...]
    recommended: Amount | None  # a row's number
    reason: str

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks whose questions were asked."""
        return sorted({task for row in self.rows if row.measured for task in row.measured.figures[PLUG_IN].accuracy})
