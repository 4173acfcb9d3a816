"""The attack of a run: a family on the built emulator, the strongest first, that a kill does not begin anew.

And the bound beside it: the base itself, tuned on the owner's text of the task.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offsite.coordinator.bundles.stored import store_adapter
from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.legality import judge
from offsite.coordinator.runs.steps import attacking
from offsite.coordinator.runs.steps.attacking import attack
from offsite.coordinator.runs.steps.building import build
from offsite.coordinator.runs.steps.evaluation import evaluate
from offsite.coordinator.runs.steps.orders import Attack, Build, Evaluate, Tune
from offsite.coordinator.runs.steps.results import Attacks
from offsite.coordinator.runs.steps.tuning import tune
from offsite.coordinator.store import blobs
from offsite.emulator import methods, zoo
from offsite.emulator.modality import encode, read
from offsite.emulator.tuning import adapting
from offsite.emulator.tuning.adapting import adapted
from offsite.protos.errors import InputError, ResourceError
from offsite.protos.figures import Score, perplexity
from offsite.protos.security.pki import Authority
from offsite.protos.spec import Choice, LocalTraining, RunSpec, TrainingSpec


def fields(material: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "model": str(material / "model"),
        "builders": (Choice(name="uniform", settings={"keep": 4}),),
        "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
        "training": TrainingSpec(batch_size=4, max_length=16),
        "public": str(material / "public.jsonl"),
        "evaluation": {"exam": str(material / "held_out.jsonl")},
        "attack_steps": 2,
        "attack_text": str(material / "attack.jsonl"),
    }
    return given | changes


@pytest.fixture(scope="module")
def material(material: Path) -> Path:
    """The task's text that is not measured on."""
    held_out, rows = ((material / f"{name}.jsonl").read_text().splitlines() for name in ("held_out", "train"))
    (material / "attack.jsonl").write_text("\n".join(row for row in rows if row not in held_out))
    return material


@pytest.fixture
def home(tmp_path: Path) -> Home:
    identity = Authority.create(tmp_path / "pki").issue("coordinator", "coordinator")
    return Home(tmp_path / "home", identity).prepare()


def ordered(home: Home, spec: Grant) -> Attack:
    """Build what the run's emulator is, and order an attack on it."""
    built = build(home.node, spec, Build(sites=("ward",)))
    return Attack(manifest=built.manifest, adapter=built.version.adapter)


def figures(made: Attacks) -> dict[str, dict[str, Score]]:
    return {one.name: one.sets for one in made.attacks}


@pytest.mark.slow
def test_a_run_is_attacked_by_the_family_and_the_strongest_comes_first(home: Home, material: Path) -> None:
    spec = Grant(**fields(material))
    order = ordered(home, spec)
    made = attack(home.node, spec, order)
    assert {one.name for one in made.attacks} == {
        *("heal 4", "heal 4, unfreeze 2", "heal 4, unfreeze 8"),
        *("unfreeze 2", "unfreeze 8", "tuned, unfreeze 2", "tuned, unfreeze 8"),
    }
    reached = [perplexity(one.sets.values()) for one in made.attacks]
    assert reached == sorted(reached) and reached[0] < reached[-1]
    assert made.attacks[0].sets.keys() == {"exam"}
    assert {span.kind for span in made.spans} == {"loading", "training", "evaluation"}
    assert figures(attack(home.node, spec, order)) == figures(made)


def test_with_public_text_alone_it_is_healed(home: Home, material: Path) -> None:
    spec = Grant(**fields(material, attack_text="", attack_longest=1))
    names = {one.name for one in attack(home.node, spec, ordered(home, spec)).attacks}
    assert names == {"heal 2", "tuned, heal 2"}


@pytest.mark.slow(alone=True)
def test_a_killed_attack_goes_on_with_what_is_left(home: Home, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Grant(**fields(material))
    order = ordered(home, spec)
    whole, measure, calls = figures(attack(home.node, spec, order)), attacking.measure, []
    assert not list(home.node.scratch.glob("unfinished-*"))

    def killed(*arguments: Any) -> dict[str, Score]:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(attacking, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        attack(home.node, spec, order)
    assert figures(attack(home.node, spec, order)) == whole
    assert len(calls) == 1 + len(whole), "no score was taken twice, but for the one that was killed"


def test_what_attacks_go_on_from_must_find_room_before_a_site_trains(
    home: Home, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Grant(**fields(material))
    order, free = ordered(home, spec), blobs.MARGIN_BYTES + (300 << 10)  # enough for the emulator itself
    monkeypatch.setattr(blobs.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    for step in (lambda spec: ordered(home, spec), lambda spec: attack(home.node, spec, order)):
        with pytest.raises(ResourceError, match="MiB are needed for what attacks on the emulator go on from after a"):
            step(spec)
    ordered(home, Grant(**fields(material, attack_steps=0, attack_text="")))


def tuned(home: Home, spec: Grant) -> Score:
    """Tune the base of a run, and return its one figure."""
    digest = zoo.digest(zoo.locate(spec.model, cache=home.root))
    made = tune(home.node, spec, Tune(base=digest, trainable=(0, 4)))
    assert {span.kind for span in made.spans} == {"loading", "training", "evaluation"}
    assert not list(home.node.scratch.glob("unfinished-*"))
    return made.sets["exam"]


def test_the_base_is_tuned_as_a_site_would_tune_it(home: Home, material: Path) -> None:
    """Of an emulator that is the base, tuned at a site on the owner's text, the plug-in is the bound."""
    whole = (Choice(name="whole"),)
    spec = Grant(
        **fields(material, builders=whole, attack_steps=3, evaluation={"exam": str(material / "public.jsonl")})
    )
    built = build(home.node, spec, Build(sites=("ward",)))
    method, places = methods.make(spec.method.name, spec.method.settings), {0: 0, 4: 4}
    model, tokenizer = zoo.load_base(zoo.locate(spec.model, cache=home.root), dtype=torch.float32)
    rules = LocalTraining(steps=3, batch_size=4, max_length=16, learning_rate=built.learning_rate)
    text = encode(read(material / "attack.jsonl"), tokenizer, max_length=16)
    stored = store_adapter(
        home.blobs(), home.node.scratch / "a", method.state(adapted(model, method, places, text, rules), places)
    )
    order = Evaluate(base=built.base.digest, manifest=None, adapter=stored.digest, recovery=built.recovery)
    plug_in, zero_shot = (evaluate(home.node, spec, one).sets["exam"] for one in (order, replace(order, adapter=None)))
    bound = tuned(home, spec)
    assert bound.nll == pytest.approx(plug_in.nll, rel=1e-5) and bound.tokens == plug_in.tokens
    assert bound.nll != pytest.approx(zero_shot.nll, rel=5e-4)


def test_a_killed_tuning_of_the_base_goes_on(home: Home, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, steps = Grant(**fields(material, attack_steps=3)), []
    whole, update = tuned(home, spec), adapting.update

    def killed(*arguments: Any) -> None:
        steps.append(arguments)
        if len(steps) == 2:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(adapting, "EVERY", 1)
    monkeypatch.setattr(adapting, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned(home, spec)
    assert tuned(home, spec) == whole and len(steps) == 1 + 3, "no step was taken twice, but for the killed one"


def test_a_tuning_of_the_base_that_gives_no_number_does_not_end_the_run(home: Home, material: Path) -> None:
    training = TrainingSpec(batch_size=4, max_length=16, learning_rate=1e30)
    assert tuned(home, Grant(**fields(material, training=training))).nll is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"attack_steps": 0}, "attack_text is for attacks, and none is asked for"),
        ({"evaluation": {}}, "attacks are measured on held-out examples"),
        ({"attack_text": "", "public": ""}, "attacks train on public text or the task's"),
        (
            {"attack_text": "held_out.jsonl"},
            "attack_text: 8 of the 8 held-out examples of exam are in .*must not train",
        ),
        ({"public": "held_out.jsonl"}, "public: 8 of the 8 held-out examples of exam"),
        ({"attack_text": "one.jsonl"}, "holds a tenth of its text back, and .*one.jsonl has one example"),
    ],
)
def test_what_would_show_nothing_is_refused(material: Path, changes: dict[str, Any], why: str) -> None:
    (material / "one.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    placed = {
        name: str(material / value) if name in ("attack_text", "public") and value else value
        for name, value in changes.items()
    }
    judge(RunSpec(**fields(material)))
    with pytest.raises(InputError, match=why):
        judge(RunSpec(**fields(material, **placed)))
