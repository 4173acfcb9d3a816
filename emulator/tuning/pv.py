"""PV-Tuning (Malinovskii et al., NeurIPS 2024, arXiv 2405.14852): training of codebooks and of codes, in turns.

The P-step descends on what is continuous, codebooks and scales, with the codes fixed. The V-step changes few codes: a
step in few groups may be long enough to reach other vectors, where one in all of them would raise the loss. Unlike
straight-through estimation it keeps no dense weights, which drift away from what is stored.

Which codes: the paper takes the groups with the largest gradient of a large batch. Batches are small here, and a step
against one's gradient lowers its loss and raises that of others; so the gradient is a running mean, a V-step is judged
by a batch that mean has not seen, and kept only if its loss falls. Where it did not, the next one aims nearer. Every
group aims equally far, relative to its map, and of a row that one changes whose way to the vectors it gets lowers the
loss most per length, to first order: all groups of a row would correct the same error.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator import modality
from offsite.emulator.formats.additive import Additive
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.modality import Batch
from offsite.kernels import codebook

TRUST = 0.3  # of the first V-step: how far a group aims, relative to the root mean square norm of groups
FARTHER, NEARER = 1.3, 0.8  # what trust is multiplied with after a V-step that was kept, or undone
MEMORY = 0.9  # share of the running mean of gradients that is left after a batch
CANDIDATES = 8  # groups that are encoded for each that may change

Loss = Callable[[], Tensor]


class Step(NamedTuple):
    """What a V-step did: the loss before and with the changed codes, how many groups changed, and whether it stayed."""

    before: float
    after: float
    changed: int
    kept: bool


def tune(
    maps: Sequence[PackedLinear],
    losses: Iterable[Loss],
    *,
    steps: int,
    learning_rate: float,
    fraction: float,
    tell: Callable[[int, int], None] = lambda step, steps: None,
) -> list[Step]:
    """Take one P-step and one V-step on each loss of a batch, in place; return the V-steps.

    The maps are Additive in fp32. The learning rate is relative to the size of what it moves, and falls linearly to 0;
    a V-step changes at most this fraction of a map's groups, none if it is 0. Raises ValueError on a loss that is not
    finite.
    """
    maps = list(maps)
    optimizer = torch.optim.Adam(_continuous(maps, learning_rate), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    means = [torch.zeros_like(map.weight, requires_grad=False) for map in _distinct(maps)]
    trust, done = TRUST, []
    for number, loss in enumerate(losses, start=1):
        slopes = p_step(maps, optimizer, loss)
        schedule.step()
        if fraction:
            step = v_step(maps, means, loss, fraction=fraction, trust=trust)
            trust *= FARTHER if step.kept or not step.changed else NEARER
            done.append(step)
            for mean, slope in zip(means, slopes, strict=True):
                mean.mul_(MEMORY).add_(slope)
        tell(number, steps)
    return done


def p_step(maps: Sequence[PackedLinear], optimizer: torch.optim.Optimizer, loss: Loss) -> list[Tensor]:
    """Descend on what the optimizer holds; return the gradient (d_out, d_in) fp32 by W of each map before the step.

    Maps that share their codes count once. W is no tensor that lasts: its gradient is the sum over tokens and uses of
    the outer products of the gradient of what comes out with what goes in. Raises ValueError on a loss that is not
    finite.
    """
    slopes = {id(map.codes): torch.zeros_like(map.weight, requires_grad=False) for map in maps}

    def listen(map: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        fed, total = arguments[0].detach().flatten(0, -2), slopes[id(map.codes)]

        def add(slope: Tensor) -> None:
            total.addmm_(slope.flatten(0, -2).T.float(), fed.float())

        output.register_hook(add)  # type: ignore[no-untyped-call]

    handles = [map.register_forward_hook(listen) for map in maps]
    try:
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    if not torch.isfinite(value):
        raise ValueError(f"the loss of a step of PV-Tuning is {value.item()}; a lower learning_rate may help")
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    value.backward(inputs=trained)  # type: ignore[no-untyped-call]  # other parameters are left alone
    optimizer.step()
    optimizer.zero_grad()
    return list(slopes.values())


@torch.no_grad()
def v_step(
    maps: Sequence[PackedLinear], slopes: Sequence[Tensor], loss: Loss, *, fraction: float, trust: float, beam: int = 8
) -> Step:
    """Change the codes of at most `fraction` of each map's groups, one a row, and undo it unless the loss falls.

    `slopes` are gradients by W as `p_step` returns them; where codes change they are set to 0, as they hold no longer.
    `trust` is how far a group aims, relative to the root mean square norm of its map's groups.
    """
    distinct = _distinct(maps)
    old = [map.parts["codes"].clone() for map in distinct]
    before = float(loss())
    chosen = [
        _recode(map, slope, fraction=fraction, trust=trust, beam=beam)
        for map, slope in zip(distinct, slopes, strict=True)
    ]
    changed = sum(len(groups) for groups in chosen)
    after = float(loss()) if changed else before
    kept = after < before
    for map, codes, slope, groups in zip(distinct, old, slopes, chosen, strict=True):
        if kept:
            slope.view(-1, cast(Additive, map.format).group)[groups] = 0
        else:
            map.parts["codes"].copy_(codes)
    return Step(before, after, changed, kept)


def divergences(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> Iterator[Loss]:
    """Yield for each batch the loss KL(teacher || student) of the next token, in nats per token that is not padding."""
    device = next(student.parameters()).device
    for batch in (batch.to(device) for batch in batches):
        with torch.no_grad():
            taught = _log_probabilities(teacher, batch)

        def loss(batch: Batch = batch, taught: Tensor = taught) -> Tensor:
            learned = _log_probabilities(student, batch)
            return functional.kl_div(learned, taught, log_target=True, reduction="batchmean")

        yield loss


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    return modality.run(model, batch)[batch.mask.bool()].float().log_softmax(dim=-1)


def _continuous(maps: Sequence[PackedLinear], learning_rate: float) -> list[dict[str, object]]:
    """Let codebooks and scales train, each at a rate relative to its root mean square."""
    groups: list[dict[str, object]] = []
    for parameter in (map.get_parameter(part) for map in _distinct(maps) for part in map.format.trained):
        size = float(parameter.detach().square().mean().sqrt())
        groups.append({"params": [parameter.requires_grad_(True)], "lr": learning_rate * size})
    return groups


def _distinct(maps: Sequence[PackedLinear]) -> list[PackedLinear]:
    """Return one of the maps that share their codes."""
    return list({id(map.codes): map for map in maps}.values())


@torch.no_grad()
def _recode(map: PackedLinear, slope: Tensor, *, fraction: float, trust: float, beam: int) -> Tensor:
    """Encode few groups anew, in place, given the gradient by W; return which have changed."""
    format, parts = cast(Additive, map.format), map.parts
    slopes = slope.view(-1, format.group)
    steepness, allowed = slopes.norm(dim=1), int(fraction * len(slopes))
    at = steepness.topk(min(CANDIDATES * allowed, int((steepness > 0).sum()))).indices
    books, scales = parts["codebooks"], parts["scales"][at // (map.in_features // format.group), None]
    codes = format.unpack(parts["codes"], len(slopes)).clone()
    here = codebook.decode(codes[at], books) * scales
    far = trust * map.weight.square().sum().div(len(slopes)).sqrt()
    aim = here - far * slopes[at] / steepness[at, None]
    fresh = codes.clone()
    fresh[at] = codebook.encode(aim / scales, books, beam=beam, held=codes[at])
    way = codebook.decode(fresh[at], books) * scales - here
    descent = torch.zeros_like(steepness)
    descent[at] = -(slopes[at] * way).sum(dim=1) / way.norm(dim=1).clamp(min=torch.finfo(way.dtype).tiny)
    of_row, column = descent.view(map.out_features, -1).max(dim=1)
    rows = of_row.topk(min(allowed, int((of_row > 0).sum()))).indices
    chosen = rows * (len(slopes) // map.out_features) + column[rows]
    codes[chosen] = fresh[chosen]
    parts["codes"].copy_(format.pack(codes))
    return chosen
