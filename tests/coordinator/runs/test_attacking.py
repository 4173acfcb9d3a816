"""The attack of a run: a family on the built emulator, the strongest first, that a kill does not begin anew."""

from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.legality import judge
from offsite.coordinator.runs.steps import attacking
from offsite.coordinator.runs.steps.attacking import attack
from offsite.coordinator.runs.steps.building import build
from offsite.coordinator.runs.steps.orders import Attack, Build
from offsite.coordinator.runs.steps.results import Attacks
from offsite.protos.errors import InputError
from offsite.protos.figures import Score, perplexity
from offsite.protos.security.pki import Authority
from offsite.protos.spec import Choice, RunSpec, TrainingSpec


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
    built = build(home, spec, Build(run="r", sites=("ward",)))
    return Attack(manifest=built.manifest, adapter=built.version.adapter)


def figures(made: Attacks) -> dict[str, dict[str, Score]]:
    return {one.name: one.sets for one in made.attacks}


def test_a_run_is_attacked_by_the_family_and_the_strongest_comes_first(home: Home, material: Path) -> None:
    spec = Grant(**fields(material))
    order = ordered(home, spec)
    made = attack(home, spec, order)
    assert {one.name for one in made.attacks} == {
        *("heal 4", "heal 4, unfreeze 2", "heal 4, unfreeze 8"),
        *("unfreeze 2", "unfreeze 8", "tuned, unfreeze 2", "tuned, unfreeze 8"),
    }
    reached = [perplexity(one.sets.values()) for one in made.attacks]
    assert reached == sorted(reached) and reached[0] < reached[-1]
    assert made.attacks[0].sets.keys() == {"exam"}
    assert {span.kind for span in made.spans} == {"loading", "training", "evaluation"}
    assert figures(attack(home, spec, order)) == figures(made)


def test_with_public_text_alone_it_is_healed(home: Home, material: Path) -> None:
    spec = Grant(**fields(material, attack_text="", attack_longest=1))
    names = {one.name for one in attack(home, spec, ordered(home, spec)).attacks}
    assert names == {"heal 2", "tuned, heal 2"}


def test_a_killed_attack_goes_on_with_what_is_left(home: Home, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Grant(**fields(material))
    order = ordered(home, spec)
    whole, measure, calls = figures(attack(home, spec, order)), attacking.measure, []
    assert not list(home.scratch.glob("unfinished-*"))

    def killed(*arguments: Any) -> dict[str, Score]:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(attacking, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        attack(home, spec, order)
    assert figures(attack(home, spec, order)) == whole
    assert len(calls) == 1 + len(whole), "no score was taken twice, but for the one that was killed"


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
