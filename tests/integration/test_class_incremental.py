"""Digits, two classes at a time, over three sites: what model surgery keeps, and that measuring changes nothing."""

import hashlib
import statistics
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import layers
from offsite.emulator.methods import Adapter, make
from offsite.emulator.retention.surgery import Surgery
from offsite.kernels.classes import class_sums
from offsite.kernels.schema import Tensors

from ..bench import class_incremental as stream

BRIEF = stream.Size(pretraining=20, rounds=1, steps=2)
LEARNED = stream.Size(pretraining=150, rounds=1)  # half as much, and a third: gains of 0.31 and 0.25


def digest(tensors: Mapping[str, Tensor]) -> str:
    made = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        made.update(key.encode() + tensor.detach().numpy().tobytes())
    return made.hexdigest()


def anchor(world: stream.World, earlier: list[Adapter]) -> Tensors:
    """Return what each step is pulled to after some tasks."""
    schema, state = world.method.schema(world.start), dict[str, Tensors]()
    for adapter in earlier:
        state = stream.PULL.remember(adapter, schema, state)
    return stream.PULL.anchor(world.start, schema, state)


@pytest.fixture(scope="module")
def world() -> stream.World:
    torch.set_num_threads(1)
    return stream.world(0, BRIEF)


@pytest.fixture(scope="module")
def done(world: stream.World) -> stream.Surgery:
    return stream.surgery(world)


def test_measuring_twice_gives_the_same_and_changes_no_bit(world: stream.World, done: stream.Surgery) -> None:
    def everything() -> list[str]:
        head = {"weight": done.weight, "bias": done.bias, "means": done.means}
        return [digest(one) for one in (*done.adapters, head, world.model.state_dict(), world.start)]

    before = everything()
    first, second = (done.retrieve(world, world.test.images) for _ in range(2))
    assert torch.equal(first.logits, second.logits) and torch.equal(first.tasks, second.tasks)
    assert first.passes <= 4 and everything() == before and len({*before}) == len(before)


def test_what_has_settled_is_predicted_the_same_with_the_adapter_of_its_own_class(
    world: stream.World, done: stream.Surgery
) -> None:
    made = done.retrieve(world, world.test.images)
    rows = made.settled.nonzero().flatten()
    assert len(rows) > 0.9 * len(made.settled)
    for task in made.tasks[rows].unique().tolist():
        own = rows[made.tasks[rows] == task]
        again = done.predict(world, world.test.images[own], task).argmax(dim=1)
        assert torch.equal(again, made.classes[own]) and bool((stream.TASK_OF[again] == task).all())


def test_a_new_task_leaves_the_adapters_of_the_others_as_they_were(world: stream.World, done: stream.Surgery) -> None:
    before = [digest(adapter) for adapter in done.adapters]
    last = stream.State(done.adapters[-1], done.weight, done.bias)
    after = world.learn(last, 0, stream.PULL, anchor(world, done.adapters))
    assert [digest(adapter) for adapter in done.adapters] == before != [digest(after.adapter)] * len(before)


def test_statistics_of_the_sites_are_those_of_all_their_rows(world: stream.World, done: stream.Surgery) -> None:
    adapter, classes = done.adapters[0], stream.TASKS[0]
    sums = world.sums(adapter, classes)
    images, labels = (
        torch.cat(parts) for parts in zip(*((one.images, one.labels) for one in world.sites), strict=True)
    )
    rows = stream.Rows(images, labels).of(classes)
    with torch.no_grad():
        central = class_sums(world.features(adapter, rows.images), rows.labels, stream.CLASSES)
    assert sums.seen.tolist() == [*classes]
    for label in classes:
        torch.testing.assert_close(sums.mean(label), central.mean(label), rtol=0, atol=1e-5)
        torch.testing.assert_close(sums.covariance(label), central.covariance(label), rtol=0, atol=1e-5)


def test_a_pull_brings_the_adapter_nearer_to_the_mean_of_the_earlier_ones(
    world: stream.World, done: stream.Surgery
) -> None:
    earlier = done.adapters[:2]
    last = stream.State(earlier[-1], done.weight, done.bias)

    def apart(alpha: float) -> float:
        made = world.learn(last, 2, Surgery(alpha=alpha), anchor(world, earlier)).adapter
        centre = {key: torch.stack([one[key] for one in earlier]).mean(dim=0) for key in made}
        return sum(float((made[key] - centre[key]).square().sum()) for key in centre)

    assert apart(0.1) < apart(0.0)


@pytest.mark.slow
def test_surgery_tells_ten_digits_apart_better_than_an_adapter_that_goes_on() -> None:
    torch.set_num_threads(1)
    gains = []
    for seed in (0, 1):
        of = stream.world(seed, LEARNED)
        plain, made = stream.naive(of), stream.surgery(of)
        images = of.test.images
        with torch.no_grad():
            logits = nn.functional.linear(of.features(plain.adapter, images), plain.weight, plain.bias)
        found = made.retrieve(of, images)
        assert found.passes <= 4 and float(found.settled.float().mean()) > 0.95
        assert of.accuracy(found.classes) > of.accuracy(made.first(of, images))
        gains.append(of.accuracy(found.classes) - of.accuracy(logits.argmax(dim=1)))
    print(f"gains {gains}")
    assert statistics.mean(gains) >= 0.12


@pytest.mark.slow
@pytest.mark.long
def test_codes_see_that_images_are_not_what_was_learned() -> None:
    torch.set_num_threads(1)
    method: Any = make("prototype", {})
    areas: dict[str, list[tuple[float, float]]] = {"inverted": [], "rotated": [], "noisy": []}
    for seed in (0, 1, 2):
        of = stream.backbone(seed, stream.Size().pretraining)
        known = {
            str(label): {
                f"0.prototype.{part}": total.double().sum(dim=0)
                for part, total in method.codes(states(of.model, of.learned.of([label]).images)).items()
            }
            for label in range(stream.CLASSES)
        }

        def strange(images: Tensor, of: Any = of, known: Any = known) -> tuple[Tensor, Tensor]:
            features = states(of.model, images)
            with torch.no_grad():
                certain = of.head(of.model(images).last_hidden_state[:, 0]).softmax(dim=1).amax(dim=1)
            return 1 - method.likeness(method.codes(features), known).amax(dim=1), 1 - certain

        clean = of.other.images
        noise = 0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        drifted = {"inverted": 1 - clean, "rotated": clean.rot90(1, (2, 3)), "noisy": clean + noise}
        usual, labels = strange(clean), [0] * len(clean) + [1] * len(clean)
        for name, images in drifted.items():
            both = zip(usual, strange(images), strict=True)
            codes, softmax = (float(roc_auc_score(labels, torch.cat(pair))) for pair in both)
            areas[name].append((codes, softmax))
    means = {name: [statistics.mean(one) for one in zip(*rows, strict=True)] for name, rows in areas.items()}
    print(f"areas under the ROC curve, by codes and by the largest softmax: {means}")
    for name, least in {"inverted": 0.8, "rotated": 0.8, "noisy": 0.7}.items():
        codes, softmax = means[name]
        assert codes >= least and codes >= softmax - 0.06


def states(model: Any, images: Tensor) -> dict[int, Tensor]:
    """Return what each layer makes of the first token, (n, d)."""
    seen: dict[int, Tensor] = {}

    def listen(at: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[at] = (output[0] if isinstance(output, tuple) else output)[:, 0]

        return hook

    handles = [layer.register_forward_hook(listen(at)) for at, layer in enumerate(layers(model))]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen
