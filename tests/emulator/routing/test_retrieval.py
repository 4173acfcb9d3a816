"""Retrieval that refines itself: it ends, and where it says that it has settled, another pass changes nothing."""

import pytest
import torch
from torch import Tensor

from offsite.emulator.routing.retrieval import refine

TASK_OF = torch.tensor([0, 0, 1, 1, 2, 2])
# What each task's adapter says of five inputs: the first guess is right, one or two passes find it, one goes in a
# circle, and one takes a class of its own task.
SAID = torch.tensor([[0, 2, 2, 2, 1], [4, 2, 4, 0, 0], [1, 2, 5, 2, 0]])
FIRST = torch.tensor([0, 1, 1, 0, 0])


def predict(task: int, rows: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(SAID[task, rows], 6).float()


def test_an_input_settles_where_a_task_predicts_its_own_class_and_ends_in_four_passes() -> None:
    made = refine(FIRST, TASK_OF, predict)
    assert made.classes[[0, 1, 2, 4]].tolist() == [0, 2, 5, 1]
    assert made.tasks[[0, 1, 2, 4]].tolist() == [0, 1, 2, 0]
    assert made.settled.tolist() == [True, True, True, False, True]  # from task 0 to 1 and back again
    assert made.passes == 4
    again = refine(made.classes, TASK_OF, predict, most=1)
    assert torch.equal(again.classes[made.settled], made.classes[made.settled])
    assert torch.equal(again.tasks[made.settled], made.tasks[made.settled])


def test_logits_are_those_of_the_adapter_that_is_named() -> None:
    made = refine(FIRST, TASK_OF, predict, most=3)
    for row, task in enumerate(made.tasks.tolist()):
        assert torch.equal(made.logits[row], predict(task, torch.tensor([row]))[0])


def test_only_inputs_whose_task_has_changed_are_predicted_again() -> None:
    asked: list[tuple[int, list[int]]] = []

    def heard(task: int, rows: Tensor) -> Tensor:
        asked.append((task, rows.tolist()))
        return predict(task, rows)

    refine(FIRST[[0, 1, 2]], TASK_OF, heard)
    assert asked == [(0, [0, 1, 2]), (1, [1, 2]), (2, [2])]


def test_nothing_is_not_refined() -> None:
    for first, most in ((FIRST[:0], 4), (FIRST, 0)):
        with pytest.raises(ValueError, match="nothing to refine; both are at least 1"):
            refine(first, TASK_OF, predict, most=most)
