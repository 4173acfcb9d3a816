import math

import pytest

from offsite.emulator import modality
from offsite.emulator.evaluation.protection import Reach, protection


def at(mean: float) -> modality.Score:
    return modality.Score(100 * mean, 100)


def test_nothing_is_protected_unless_a_threshold_is_stated() -> None:
    found = protection({"unfreeze": Reach(at(9), at(9))}, plug_in=at(2), base=at(3))
    assert (found.label, found.threshold) == ("not protected", None)
    assert "no threshold was stated" in found.reason


def test_margins_are_the_least_over_attacks_in_nats_of_perplexity() -> None:
    plug_in, base = modality.Score(40, 20), modality.Score(60, 20)
    attacks = {"unfreeze": Reach(at(2.5), at(5)), "heal": Reach(at(3.5), at(3.25))}
    found = protection(attacks, plug_in=plug_in, base=base)
    assert found.task == pytest.approx(math.log(attacks["unfreeze"].task.perplexity / plug_in.perplexity))
    assert found.general == pytest.approx(math.log(attacks["heal"].general.perplexity / base.perplexity))
    assert (found.task, found.general, found.margin) == pytest.approx((0.5, 0.25, 0.25))
    assert "'unfreeze' comes within 0.50 nats of the plug-in" in found.reason
    assert "'heal' comes within 0.25 nats of the base" in found.reason


@pytest.mark.parametrize(("threshold", "label"), [(0.25, "protected"), (0.26, "not protected")])
@pytest.mark.parametrize("weakest", ["task", "general"])
@pytest.mark.parametrize("first", [True, False])
def test_protected_means_that_every_margin_of_every_attack_reaches_the_threshold(
    threshold: float, label: str, weakest: str, first: bool
) -> None:
    weak = Reach(at(2.25), at(9)) if weakest == "task" else Reach(at(9), at(2.25))
    pair = [("weak", weak), ("strong", Reach(at(9), at(9)))]
    found = protection(dict(pair if first else pair[::-1]), plug_in=at(2), base=at(2), threshold=threshold)
    assert found.label == label
    assert f"{threshold:g} nats" in found.reason


def test_an_attack_that_beats_the_plug_in_is_said_so() -> None:
    found = protection({"unfreeze": Reach(at(1.9), at(9))}, plug_in=at(2), base=at(3), threshold=0.01)
    assert found.label == "not protected" and found.task == pytest.approx(-0.1)
    assert "'unfreeze' is better than the plug-in on the task's text, by 0.10 nats" in found.reason


@pytest.mark.parametrize("mean", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["task", "general"])
def test_an_attack_that_failed_protects_nothing(mean: float, part: str) -> None:
    failed = Reach(at(mean), at(9)) if part == "task" else Reach(at(9), at(mean))
    with pytest.raises(ValueError, match="heal: the likelihood is (nan|inf)"):
        protection({"unfreeze": Reach(at(9), at(9)), "heal": failed}, plug_in=at(2), base=at(3), threshold=0.3)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_that_anything_reaches_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        protection({"unfreeze": Reach(at(9), at(9))}, plug_in=at(2), base=at(3), threshold=threshold)


def test_protection_without_an_attack_is_refused() -> None:
    with pytest.raises(ValueError, match="none was given"):
        protection({}, plug_in=at(2), base=at(3), threshold=0.3)
