"""The owner's policy: what a researcher may name, ask for and have, and what emulators disclose together."""

import contextlib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.bundles.disclosures import record, union
from offsite.coordinator.home import Home
from offsite.coordinator.policy import OwnerPolicy
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.legality import judge
from offsite.emulator.builders import BUILDERS
from offsite.emulator.evaluation.portion import Portion
from offsite.emulator.methods import METHODS
from offsite.emulator.methods.base import Disclosure
from offsite.emulator.modality import read
from offsite.protos.documents import parse
from offsite.protos.errors import InputError, NotFoundError, RefusedError
from offsite.protos.recipes import parse as parse_recipe
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Ancestor, Choice, RunSpec, TrainingSpec


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `texts/`, which the policy allows, `model/`, and a secret beside them."""
    (tmp_path / "texts" / "held-out").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "classified"}\n')
    (tmp_path / "texts" / "public.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "texts" / "held-out" / "ward.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "texts" / "inside.jsonl").symlink_to(tmp_path / "texts" / "public.jsonl")
    (tmp_path / "texts" / "outside.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "owner.toml").write_text('data = ["texts"]\n[models]\nbase = "model"\nhub = "org/name"\n')
    return tmp_path


@pytest.fixture
def policy(place: Path) -> OwnerPolicy:
    return OwnerPolicy.load(place / "owner.toml")


def grant(
    policy: OwnerPolicy,
    *,
    role: Any = "researcher",
    live: int = 0,
    continues: Ancestor | None = None,
    **fields: Any,
) -> Grant:
    spec = RunSpec(**{"model": "base", **fields})
    return policy.grant(spec, role=role, person="alice", live=live, continues=continues)


def test_names_stand_for_places_and_the_run_is_told_by_its_names(policy: OwnerPolicy, place: Path) -> None:
    granted = grant(
        policy, public="inside.jsonl", attack_text="public.jsonl", evaluation={"ward": "held-out/ward.jsonl"}
    )
    assert granted.model == str(place / "model") and granted.base_name == "base"
    assert granted.public == granted.attack_text == str(place / "texts" / "public.jsonl")
    assert granted.evaluation == {"ward": str(place / "texts" / "held-out" / "ward.jsonl")}
    said = f"{place}/model/config.json is bad, {place}/texts/held-out/ward.jsonl too, as is {place}/other/x.bin"
    assert granted.discreet(said) == "base/config.json is bad, held-out/ward.jsonl too, as is x.bin"
    assert grant(policy, model="hub").model == "org/name"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "/etc"}, r"\(models\)"),
        ({"model": "org/name"}, r"\(models\)"),
        ({"public": "/etc/passwd"}, r"\(data\)"),
        ({"calibration": "held-out/../../secret.jsonl"}, r"\(data\)"),
        ({"attack_text": "outside.jsonl"}, r"\(data\).*leads out"),
        ({"evaluation": {"x": "../secret.jsonl"}}, r"\(data\)"),
        ({"evaluation": {"x": "outside.jsonl"}}, r"\(data\).*leads out"),
        ({"builders": (Choice(name="whole"),)}, r"\(builders\)"),
        ({"method": Choice(name="blocks")}, r"\(methods\)"),
        ({"merge": True}, r"\(merged\)"),
        ({"method": Choice(name="lora", settings={"init": "pissa"})}, r"\(merged\): .* lora\(init=pissa\) has parts"),
        ({"method": Choice(name="lora", settings={"init": "corda"})}, r"\(merged\): .* lora\(init=corda\) has parts"),
        ({"method": Choice(name="soka")}, r"\(merged\): an adapter of soka has parts of the base's weights"),
        ({"method": Choice(name="dora")}, r"\(merged\): an adapter of dora has figures of the base's weights"),
        ({"method": Choice(name="lora", settings={"rank": 257})}, r"\(max_rank\): 257 is more than 256"),
        ({"method": Choice(name="lora", settings={"rank_pattern": {"q_proj": 257}})}, r"\(max_rank\): 257 is more"),
        ({"rounds": 21}, r"\(max_rounds\): 21 is more than 20"),
        ({"training": TrainingSpec(steps=1001)}, r"\(max_steps\)"),
        ({"training": TrainingSpec(batch_size=65)}, r"\(max_batch_size\)"),
        ({"training": TrainingSpec(max_length=4097)}, r"\(max_length\)"),
        ({"realign_steps": 10_001}, r"\(max_tuning_steps\)"),
        ({"attack_steps": 2501}, r"\(max_tuning_steps\): 10004 is more than 10000"),
        ({"builders": (Choice(name="crash"), Choice(name="distilled", settings={"steps": 10_001}))}, "max_tuning"),
        ({"min_sites": 101}, r"\(max_sites\)"),
        ({"live": 4}, r"\(max_live_runs\)"),
        ({"priority": 1}, r"\(max_priority\): 1 is more than 0"),
    ],
)
def test_a_researcher_is_refused_what_an_owner_may_ask(policy: OwnerPolicy, fields: Any, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        grant(policy, **fields)
    grant(policy, role="owner", **fields)


@pytest.mark.parametrize(("chain", "allowed"), [("quantised", False), ("loram+quantised", True), ("crash", True)])
def test_a_researcher_is_refused_an_emulator_that_is_the_whole_base(material: Path, chain: str, allowed: bool) -> None:
    policy = OwnerPolicy(models={"base": str(material / "model")}, data=(str(material),))
    fields = {"builders": parse_recipe(chain), "trainable": parse_one("ends(bottom=1,top=1)"), "public": "public.jsonl"}
    for role, passes in (("researcher", allowed), ("owner", True)):
        granted = grant(policy, role=role, training=TrainingSpec(max_length=32), **fields)
        with contextlib.nullcontext() if passes else pytest.raises(RefusedError, match=r"\(builders\).*whole base"):
            judge(granted, whole=granted.whole)


def test_a_run_goes_on_from_another_within_the_rounds_of_both_and_if_the_policy_lets_it(policy: OwnerPolicy) -> None:
    last = Ancestor(run="old", round=4, rounds=15)
    assert grant(policy, continues=last, rounds=5).continues == last
    assert grant(policy, role="owner", continues=last, rounds=50).continues == last
    with pytest.raises(RefusedError, match=r"\(max_rounds\): 21 is more than 20"):
        grant(policy, continues=last, rounds=6)
    with pytest.raises(RefusedError, match=r"\(continued\): a run begins from what changes nothing"):
        grant(replace(policy, continued=False), continues=last)


def test_without_a_file_a_researcher_may_name_nothing_and_files_that_are_not_there_are_not_found(
    policy: OwnerPolicy,
) -> None:
    with pytest.raises(RefusedError, match="models"):
        grant(OwnerPolicy())
    with pytest.raises(NotFoundError, match=r"none.jsonl: no such file in the folders of the owner's policy"):
        grant(policy, public="none.jsonl")


def test_merged_models_are_for_those_the_policy_names(policy: OwnerPolicy, place: Path) -> None:
    assert policy.may_fetch("merged/model.safetensors", role="owner", person="olga")
    assert policy.may_fetch("adapter/adapter_model.safetensors", role="researcher", person="alice")
    assert not policy.may_fetch("merged/model.safetensors", role="researcher", person="alice")
    assert not policy.may_fetch("adapter/adapter_model.safetensors", role="auditor", person="ada")
    (place / "owner.toml").write_text('merged = ["alice"]\n[models]\nbase = "model"\n')
    other = OwnerPolicy.load(place / "owner.toml")
    assert grant(other, merge=True).merge
    for method in (Choice(name="lora", settings={"init": "olora"}), Choice(name="soka"), Choice(name="dora")):
        assert grant(other, method=method).method == method
    assert other.may_fetch("merged/model.safetensors", role="researcher", person="alice")


@pytest.mark.parametrize("disclosure", Disclosure)
def test_a_method_of_another_package_is_held_back_by_what_it_declares(
    place: Path, monkeypatch: pytest.MonkeyPatch, disclosure: Disclosure
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "plugin")
    monkeypatch.setitem(METHODS._points, "sparse", [EntryPoint("sparse", "offsite_sparse:Sparse", METHODS.group)])
    monkeypatch.setitem(METHODS._loaded, "sparse", type("Declared", (METHODS["sparse"],), {"disclosure": disclosure}))
    for merged in ((), ("alice",)):
        policy = OwnerPolicy(models={"base": str(place / "model")}, methods=("sparse",), merged=merged)
        refused = pytest.raises(RefusedError, match=rf"\(merged\): an adapter of sparse has {disclosure} of the base's")
        with refused if disclosure and not merged else contextlib.nullcontext():
            grant(policy, method=Choice(name="sparse"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('data = ["nowhere"]', "data: nowhere is not a folder"),
        ('[models]\nbase = "/no/such/folder"', "models: base: /no/such/folder is neither a folder"),
        ('builders = ["crush"]', "builders: there is no builder 'crush'; did you mean crash"),
        ("max_disclosed = 1.1", "max_disclosed"),
        ("max_round = 3", "max_round"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(place: Path, text: str, said: str) -> None:
    (place / "owner.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        OwnerPolicy.load(place / "owner.toml")


def test_the_example_and_the_table_have_every_bound_and_the_default_all_builders_but_whole() -> None:
    example = (Path(__file__).parents[2] / "docs" / "owner.toml").read_text()
    default = OwnerPolicy()
    assert all(f"{name} = " in example or f"[{name}]" in example for name in OwnerPolicy.__dataclass_fields__)
    assert len(default.describe()) == len(OwnerPolicy.__dataclass_fields__) - 1  # batch and length share a row
    assert {*default.builders} == BUILDERS.keys() - {"whole"} and {*default.methods} == METHODS.keys() - {
        "blocks",
        "fisher",
        "moments",
        "prototype",
        "signature",
    }


def portions(*kept: int, part: str = "", share: float = 1.0, lossy: bool = False) -> dict[str, Portion]:
    """An emulator of a base of ten layers of 100 parameters, 10 of which every emulator has verbatim."""
    held = {
        str(layer): (10, round(90 * share)) if lossy else (round(100 * share), 0) if layer in kept else (0, 0)
        for layer in range(10)
    }
    return {layer: Portion(*(pair if int(layer) in kept else (0, 0)), 100, part) for layer, pair in held.items()}


def test_emulators_disclose_the_union_of_what_each_does() -> None:
    assert union([portions(0, 1, 2), portions(2, 3)]) == (400, 400)
    assert union([portions(0, 1), portions(0, 1, lossy=True)]) == (200, 200)
    assert union([portions(0, lossy=True)]) == (10, 100)
    half = portions(0, part="a", share=0.6)
    assert union([half, half]) == (60, 60)
    assert union([half, portions(0, part="b", share=0.6)]) == (100, 100)


def test_a_second_emulator_may_not_complete_the_base_for_a_researcher(tmp_path: Path) -> None:
    home = Home(tmp_path, tmp_path).prepare()
    record(home, "1", base="b", portions=portions(*range(8)), bound=True)
    record(home, "1", base="b", portions=portions(*range(8)), bound=True)
    with pytest.raises(RefusedError, match=r"max_disclosed\): with this emulator 100.0% of the base .* 80.0% are by"):
        record(home, "2", base="b", portions=portions(*range(2, 10)), bound=True)
    record(home, "3", base="b", portions=portions(*range(9)), bound=True)
    record(home, "4", base="other", portions=portions(*range(2, 10)), bound=True)
    with pytest.raises(RefusedError, match="max_disclosed_lossy"):
        record(home, "5", base="third", portions=portions(*range(10), lossy=True), bound=True)
    record(home, "6", base="b", portions=portions(*range(10)), bound=False)  # an owner's
    record(home, "7", base="b", portions=portions(*range(2, 10)), bound=True)  # nothing that is not disclosed yet


def test_a_damaged_text_is_told_to_a_researcher_without_a_word_of_it(policy: OwnerPolicy, place: Path) -> None:
    (place / "texts" / "bad.jsonl").write_text('{"text": "fine"}\n{"diagnosis": "classified"}\n')
    told = {}
    for role in ("researcher", "owner"):
        granted = grant(policy, role=role, public="bad.jsonl")
        with pytest.raises(ValueError, match="diagnosis") as raised:
            read(Path(granted.public))
        told[role] = granted.wording(raised.value)
    assert "diagnosis" in told["owner"] and "diagnosis" not in told["researcher"]
    assert told["researcher"].startswith("bad.jsonl, line 2: among ")


def test_a_grant_is_the_run_itself_where_nothing_was_granted() -> None:
    plain = parse(Grant, {"model": "/models/base"}, where="run")
    assert plain.role == "owner" and plain.wording(ValueError("/models/base is bad")) == "/models/base is bad"
