"""A classifier for all tasks at once, from the statistics of their classes alone (MOS, arXiv 2412.09441, section 3.4).

Each task's classes were learned without the others', so their logits are on no common scale. No row of an earlier task
is kept: rows are drawn from each class's Gaussian, as its sites' sums have it.
"""

import torch
from torch import Tensor
from torch.nn import functional

from offsite.kernels.classes import ClassSums


def align(
    weight: Tensor,
    bias: Tensor,
    sums: ClassSums,
    *,
    rows: int = 64,
    epochs: int = 30,
    rate: float = 0.05,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return a head (C, d), (C,) trained on `rows` samples of each class that has statistics, by SGD with momentum.

    The head that is given is where it begins, and stays as it is; a class without rows keeps its own. Raises ValueError
    if no class has any, or one has too few.
    """
    seen = sums.seen.tolist()
    if not seen:
        raise ValueError("no class has statistics; measure some before a head is aligned")
    generator = torch.Generator().manual_seed(seed)
    features = torch.cat([sums.sample(label, rows, generator) for label in seen]).to(weight)
    labels = torch.arange(len(seen)).repeat_interleave(rows)
    head = [weight[seen].detach().clone().requires_grad_(), bias[seen].detach().clone().requires_grad_()]
    optimizer = torch.optim.SGD(head, lr=rate, momentum=0.9)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for part in (order[at : at + batch_size] for at in range(0, len(labels), batch_size)):
            optimizer.zero_grad()
            functional.cross_entropy(functional.linear(features[part], *head), labels[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        decay.step()
    aligned_weight, aligned_bias = weight.detach().clone(), bias.detach().clone()
    aligned_weight[seen], aligned_bias[seen] = head[0].detach(), head[1].detach()
    return aligned_weight, aligned_bias
