"""What steps ask of a node, and what is said where no node has it."""

from dataclasses import replace
from typing import Any

import pytest

from offsite.coordinator.runs.grant import Grant, Input
from offsite.coordinator.runs.needs import Needs, NoRoom, ask, of
from offsite.coordinator.runs.steps.orders import (
    Attack,
    Build,
    Divide,
    Encode,
    Evaluate,
    Gather,
    Outlined,
    Publish,
    Tune,
)
from offsite.coordinator.runs.steps.results import Built
from offsite.protos.chunks import digest_bytes
from offsite.protos.spec import Choice, FileEntry, TrainingSpec

GB = 10**9
SOME = digest_bytes(b"some")
SMALL, LARGE = {"CPU": 4.0, "memory": 8.0 * GB}, {"CPU": 2.0, "memory": 64.0 * GB}
GPU = {"CPU": 8.0, "memory": 16.0 * GB, "GPU": 1.0}


@pytest.fixture
def built(stand: Any) -> Built:
    """Of a base of 9 parameters, an emulator of 6."""
    return stand._build(b'{"sites": ["ward"]}')


def test_what_a_step_needs_grows_with_what_it_holds(built: Built) -> None:
    spec = Grant(model="m", builders=(Choice(name="crash"), Choice(name="quantised")))
    half = replace(spec, training=TrainingSpec(precision="bf16"))
    base = Evaluate(base=SOME, manifest=None, adapter=None, recovery=None)
    emulator = replace(base, manifest=SOME)
    assert [of(one, spec, built).memory for one in (base, emulator)] == [4 * 9, 4 * 6]
    assert of(base, half, built).memory == 2 * 9
    with_memory = replace(base, adapter=SOME, memory={"memory.offline": SOME})
    assert of(with_memory, spec, built).memory == 4 * (9 + 9 // 3), "one layer of three trains, for another expert"
    assert of(Attack(manifest=SOME, adapter=SOME), half, built).memory == 16 * 6
    assert of(Tune(base=SOME, trainable=(0,)), spec, built).gpu
    publish = Publish(base=SOME, adapter=SOME, recovery=None)
    assert [of(publish, replace(spec, merge=merge), built).memory for merge in (False, True)] == [2 * 9, 4 * 9]


def test_a_build_needs_its_base_as_it_is_stored_unless_it_may_read_that_layer_by_layer() -> None:
    files = (FileEntry(path="model.safetensors", digest=SOME, size=7), FileEntry(path="a.json", digest=SOME, size=1))
    spec = Grant(model="m", builders=(Choice(name="crash"),), inputs={"m": Input(source="/m", files=files)})
    build = Build(sites=("ward",))
    assert of(build, spec, None) == Needs()
    assert of(build, replace(spec, builders=(*spec.builders, Choice(name="quantised"))), None).memory == 14
    assert of(Gather(), spec, None) == Needs(home=True)
    several = replace(spec, builders=(*spec.builders, Choice(name="additive")))
    assert of(Divide(build=build), several, None).memory == 14
    chosen = Outlined(layers=(0,), trainable=(0,), shared={}, grounds=None)
    assert of(Encode(outline=chosen, weights=SOME, parts=2, part=0), several, None).memory == 7


def test_a_step_goes_where_there_is_room_and_to_a_gpu_where_one_is_large_enough() -> None:
    nodes = [SMALL, LARGE, GPU]
    assert ask(Needs(9 * GB), nodes, cpus=1, step="tune") == {"CPU": 1, "memory": 9 * GB, "GPU": 0}
    assert ask(Needs(9 * GB, gpu=True), nodes, cpus=1, step="tune")["GPU"] == 1
    assert ask(Needs(17 * GB, gpu=True), nodes, cpus=1, step="tune")["GPU"] == 0
    trained = ask(Needs(90 * GB, loaded=5 * GB, gpu=True), nodes, cpus=1, step="attack")
    assert trained == {"CPU": 1, "memory": 5 * GB, "GPU": 1}, "the rest is in the GPU's memory"
    assert ask(Needs(), nodes, cpus=64, step="tune")["CPU"] == 8, "all that a node has"


def test_a_step_that_fits_nowhere_is_refused_with_what_it_needs_and_what_there_is() -> None:
    with pytest.raises(NoRoom) as refused:
        ask(Needs(65 * GB), [SMALL, LARGE], cpus=2, step="tune")
    assert str(refused.value) == (
        "step tune needs a node with 2 CPUs and 65.0 GB of memory, and the largest of 2 have 2 CPUs and 64.0 GB of "
        "memory; 4 CPUs and 8.0 GB of memory; add a larger one to the cluster, or take a smaller model"
    )
    assert ask(Needs(home=True), [{**LARGE, "CPU": 0.0}], cpus=2, step="gather")["CPU"] == 0
    with pytest.raises(NoRoom, match="the largest of 1 have 0 CPUs and 64.0 GB"):
        ask(Needs(), [{**LARGE, "CPU": 0.0}], cpus=1, step="tune")
