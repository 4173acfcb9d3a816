"""What every modality owes, run over the family's own mapping: one forward pass, a loss, and scores that add up."""

from functools import reduce
from operator import add
from typing import Any

import pytest
import torch

from offsite.emulator import modality
from offsite.emulator.modality import MODALITIES, Batch, Modality, Score, loss, run, score

Case = tuple[Modality, Any, list[Batch]]


@pytest.fixture(params=sorted(MODALITIES))
def case(request: pytest.FixtureRequest, tiny: Any, text: list[Batch]) -> Case:
    """A modality, a model for it and batches of unequal sizes."""
    cases = {"causal-text": (tiny("gpt2"), text)}  # it has dropout
    if request.param not in cases:
        pytest.skip(f"this suite has no batches of {request.param}")
    return MODALITIES.make(request.param, {}), *cases[request.param]


def test_batches_bear_its_name_and_are_scored_in_its_metric(case: Case) -> None:
    kind, model, batches = case
    assert {batch.modality for batch in batches} == {kind.name}
    whole = score(model, batches)
    assert whole.metric == kind.metric and whole.count == sum(batch.targets for batch in batches)


def test_scores_of_parts_are_that_of_the_whole(case: Case) -> None:
    _, model, batches = case
    assert len(batches) > 1
    assert reduce(add, (score(model, [batch]) for batch in batches)) == score(model, batches)


def test_the_loss_is_the_mean_score_and_differentiable(case: Case) -> None:
    _, model, batches = case
    for batch in batches:
        value = loss(model, batch)
        assert float(value.detach()) == pytest.approx(score(model, [batch]).mean, rel=1e-5)
    value.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_outputs_that_are_not_kept_change_nothing_in_those_that_are(case: Case) -> None:
    _, model, batches = case
    with torch.no_grad():
        every = run(model, batches[0])
        keep = torch.tensor([0, every.shape[1] - 1])
        torch.testing.assert_close(run(model, batches[0], keep=keep), every[:, keep])


def test_scoring_leaves_the_mode_and_no_gradient(case: Case) -> None:
    _, model, batches = case
    expected = score(model, batches)
    assert score(model.train(), batches) == expected and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_there_is_no_score_of_nothing_and_no_sum_of_two_metrics(case: Case) -> None:
    with pytest.raises(ValueError, match="no batch was given"):
        modality.score(case[1], [])
    with pytest.raises(ValueError, match="in nll and one in errors do not add up"):
        Score(1.0, 2, "nll") + Score(1.0, 2, "errors")
