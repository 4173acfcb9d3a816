"""Steps on a machine that has nothing of the owner's: they read it from the blobs, and give the same bytes."""

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from offsite.client import Choice, TrainingSpec
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.shards import in_parts
from offsite.coordinator.runs.steps.inputs import at_desk, here
from offsite.coordinator.runs.steps.orders import Build, Divide, Evaluate, Gather, Order, Publish, Tune
from offsite.coordinator.runs.steps.performing import perform
from offsite.coordinator.runs.steps.results import Built, Division, Evaluation, Inputs, Publication
from offsite.emulator import zoo
from offsite.protos.documents import from_json, to_json, to_plain
from offsite.protos.errors import InputError

R = TypeVar("R")


@pytest.fixture
def owned(tmp_path: Path, material: Path) -> Path:
    """The owner's files, of this test alone; one text is a folder, with what is no text in it."""
    folder = Path(shutil.copytree(material, tmp_path / "owned"))
    (folder / "texts" / "more").mkdir(parents=True)
    (folder / "texts" / ".hidden.jsonl").write_text("{")
    (folder / "texts" / "read.me").write_text("no text")
    shutil.copy(folder / "held-out.jsonl", folder / "texts" / "more" / "exam.jsonl")
    (folder / "texts" / "again.jsonl").symlink_to(folder / "texts" / "more" / "exam.jsonl")
    return folder


@pytest.fixture
def spec(owned: Path) -> Grant:
    return Grant(
        model=str(owned / "model"),
        builders=(Choice(name="crash", settings={"keep": 5}), Choice(name="distilled", settings={"steps": 2})),
        trainable=Choice(name="ends", settings={"bottom": 1, "top": 1}),
        method=Choice(name="lora", settings={"rank": 4, "alpha": 8.0}),
        training=TrainingSpec(steps=4, learning_rate=0.01, max_length=32, seed=3),
        public=str(owned / "public.jsonl"),
        evaluation={"exam": str(owned / "texts")},
        attack_text=str(owned / "hospital.jsonl"),
        attack_steps=2,
        merge=True,
    )


@pytest.fixture
def node(tmp_path: Path) -> Callable[[str], Node]:
    """A maker of machines that share the blobs and nothing else."""
    return lambda name: Node(tmp_path / name, f"file://{tmp_path}/blobs").prepare()


def do(node: Node, spec: Grant, order: Order, gives: type[R]) -> R:
    return from_json(gives, perform(node, order.step, to_json(spec), to_json(order)), where=order.step)


def outcome(node: Node, spec: Grant) -> list[dict[str, Any]]:
    """All that some steps give but times, of a run in which no site has changed anything."""
    built = do(node, spec, Build(sites=("ward",)), Built)
    base, adapter = built.base.digest, built.version.adapter
    measured = Evaluate(base=base, manifest=None, adapter=adapter, recovery=built.recovery)
    results = [
        built,
        do(node, spec, measured, Evaluation),
        do(node, spec, replace(measured, manifest=built.manifest), Evaluation),
        do(node, spec, Tune(base=base, trainable=(0, 5)), Evaluation),
        do(node, spec, Publish(base=base, adapter=adapter, recovery=built.recovery), Publication),
    ]
    return [{name: value for name, value in to_plain(one).items() if name != "spans"} for one in results]


def test_a_machine_without_the_owners_files_gives_the_same_bytes(
    owned: Path, spec: Grant, node: Callable[[str], Node]
) -> None:
    torch.set_num_threads(1)
    wanted = outcome(node("home"), replace(spec, base_name="base"))
    inputs = do(node("home"), spec, Gather(), Inputs).places
    assert [entry.path for entry in inputs[str(owned / "texts")].files] == ["again.jsonl"], "each text once"
    owned.rename(owned.with_name("gone"))
    elsewhere = node("elsewhere")
    assert outcome(elsewhere, replace(spec, base_name="base", inputs=inputs)) == wanted
    assert not list(elsewhere.scratch.iterdir())


def test_a_file_that_is_there_is_not_fetched_and_one_that_has_changed_is(
    owned: Path, spec: Grant, node: Callable[[str], Node]
) -> None:
    inputs = do(node("home"), spec, Gather(), Inputs).places
    gathered, public = replace(spec, inputs=inputs), Path(spec.public)
    before = public.read_bytes()
    public.write_bytes(before[::-1])
    with at_desk(node("elsewhere")) as desk:
        text, model = Path(here(desk, gathered, spec.public)), Path(here(desk, gathered, spec.model))
        assert text.read_bytes() == before and not text.is_symlink() and text.name == public.name
        assert (model / "model.safetensors").resolve() == owned / "model" / "model.safetensors"


def test_sets_that_are_measured_apart_have_the_figures_of_all_together(
    spec: Grant, node: Callable[[str], Node]
) -> None:
    torch.set_num_threads(1)
    home, model = node("home"), Path(spec.model)
    several = replace(
        spec, evaluation={name: str(model.parent / f"{name}.jsonl") for name in ("bank", "held-out", "hospital")}
    )
    order = Evaluate(base=zoo.digest(model), manifest=None, adapter=None, recovery=None)

    def measured(parts: int) -> dict[str, Any]:
        def alone(orders: Sequence[Order]) -> list[bytes]:
            return [perform(home, one.step, to_json(several), to_json(one)) for one in orders]

        return from_json(Evaluation, in_parts(order, several, parts, alone), where="evaluate").sets

    whole = measured(1)
    assert [*whole] == ["bank", "held-out", "hospital"]
    for parts in (2, 3):
        assert list(measured(parts).items()) == list(whole.items())


ADDITIVE = Choice(name="additive", settings={"group": 4, "bits": 4, "steps": 2})
IN_PARTS = {
    "additive": (Choice(name="crash", settings={"keep": 5, "sharing": "on"}), ADDITIVE),
    "sketch": (Choice(name="sketch", settings={"layers": "all"}),),
}


@pytest.mark.slow(alone=True)
@pytest.mark.parametrize("chain", IN_PARTS.values(), ids=IN_PARTS)
def test_an_emulator_built_in_parts_has_the_bytes_of_one_that_is_built_at_once(
    spec: Grant, node: Callable[[str], Node], chain: tuple[Choice, ...]
) -> None:
    torch.set_num_threads(1)
    spec = replace(spec, builders=chain)
    gathered = replace(spec, inputs=do(node("home"), spec, Gather(), Inputs).places)
    order, nodes, done = Build(sites=("ward", "bank")), itertools.count(1), list[str]()

    def built(parts: int) -> Built:
        def apart(orders: Sequence[Order]) -> list[bytes]:
            done.extend(one.step for one in orders)
            last_first = [
                perform(node(f"node-{next(nodes)}"), one.step, to_json(gathered), to_json(one))
                for one in reversed(orders)
            ]
            return last_first[::-1]

        return from_json(Built, in_parts(order, gathered, parts, apart), where="build")

    whole = built(1)
    assert (whole.recovery is None) == (chain[-1] is ADDITIVE)
    for parts in (2, 3):
        done.clear()
        divided = built(parts)
        assert done == ["divide", *["encode"] * parts, "build"] and len(divided.spans) == parts + 2
        assert replace(divided, spans=whole.spans) == whole


def test_a_chain_that_changes_layers_before_it_stores_them_is_built_at_once(
    spec: Grant, node: Callable[[str], Node]
) -> None:
    home = node("home")
    tuned = replace(spec, builders=(*spec.builders, replace(ADDITIVE, settings=ADDITIVE.settings | {"steps": 0})))
    for chain in (spec.builders, tuned.builders):
        division = do(home, replace(spec, builders=chain), Divide(build=Build(sites=("ward",))), Division)
        assert division.built is not None and division.outline is None


@pytest.mark.parametrize("role", ["owner", "researcher"])
def test_what_is_wrong_with_a_file_is_told_by_the_name_the_run_has_for_it(
    spec: Grant, node: Callable[[str], Node], role: str, owned: Path
) -> None:
    Path(spec.public).write_text("no row\n")
    inputs = do(node("home"), spec, Gather(), Inputs).places
    names = {spec.public: "north/public"}
    bad = replace(spec, inputs=inputs, **{"role": role, "names": names if role == "researcher" else {}})
    shutil.rmtree(owned)
    with pytest.raises(InputError) as refused:
        do(node("elsewhere"), bad, Build(sites=("ward",)), Built)
    told = spec.public if role == "owner" else names[spec.public]
    assert str(refused.value).startswith(f"{told}, line 1: ")
