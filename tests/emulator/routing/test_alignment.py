"""A head for classes that were never seen together."""

import pytest
import torch
from torch.nn import functional

from offsite.emulator.routing.alignment import align
from offsite.kernels.classes import class_sums

D, CLASSES = 8, 5


def test_classes_of_statistics_alone_are_told_apart_and_others_keep_their_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % (CLASSES - 1)
    centres = 3 * torch.randn(CLASSES, D, generator=draw)
    features = centres[labels] + torch.randn(400, D, generator=draw)
    weight, bias = torch.randn(CLASSES, D, generator=draw), torch.zeros(CLASSES)  # as from tasks that knew no others
    given = weight.clone()
    sums = class_sums(features[:200], labels[:200], CLASSES)
    made = align(weight, bias, sums)

    def accuracy(head: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float((functional.linear(features[200:], *head).argmax(dim=1) == labels[200:]).float().mean())

    assert accuracy((weight, bias)) < 0.5 and accuracy(made) > 0.95
    assert torch.equal(weight, given) and torch.equal(made[0][-1], given[-1]) and made[1][-1] == 0
    assert all(torch.equal(one, other) for one, other in zip(made, align(weight, bias, sums), strict=True))


def test_without_statistics_there_is_no_head() -> None:
    empty = class_sums(torch.ones(0, D), torch.zeros(0, dtype=torch.int64), CLASSES)
    with pytest.raises(ValueError, match="no class has statistics"):
        align(torch.zeros(CLASSES, D), torch.zeros(CLASSES), empty)
    with pytest.raises(ValueError, match="class 0 has 1 rows"):
        one = class_sums(torch.ones(1, D), torch.zeros(1, dtype=torch.int64), CLASSES)
        align(torch.zeros(CLASSES, D), torch.zeros(CLASSES), one)
