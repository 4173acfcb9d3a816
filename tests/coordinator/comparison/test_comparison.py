"""A comparison of a tiny model's emulators, end to end: measured as at a site, resumed after a kill."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from offsite.coordinator.commands.compare import compare as command
from offsite.coordinator.comparison.compare import compare
from offsite.coordinator.comparison.plan import Plan, cross
from offsite.coordinator.comparison.rows import Comparison, Measured
from offsite.protos.documents import from_json
from offsite.protos.errors import InputError
from offsite.protos.spec import TrainingSpec

pytestmark = pytest.mark.slow  # a whole comparison, which every worker would make of its own

GRIDS, PLACES, METHODS = ["uniform(keep=4|5|9)"], ["ends(bottom=1,top=1)"], ["lora(rank=2)", "blocks"]


@dataclass
class Ear:
    """Hears what a comparison is doing, and kills it when it comes to something."""

    kill_at: str = "never"
    heard: list[str] = field(default_factory=list)

    def __call__(self, what: str, step: int, steps: int) -> None:
        if what.startswith(self.kill_at):
            raise KeyboardInterrupt
        self.heard.append(what)

    @property
    def built(self) -> list[str]:
        return [what for what in self.heard if what.startswith("building")]


@dataclass
class Outcome:
    """What the comparison said, in which folder, and what was heard before and after it was killed."""

    found: Comparison
    plan: Plan
    folder: Path
    before: Ear
    after: Ear

    def one(self, number: int) -> Measured:
        measured = self.found.rows[number - 1].measured
        assert measured is not None, self.found.rows[number - 1].fault
        return measured


@pytest.fixture(scope="module")
def outcome(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Six candidates, of which the last two cannot be built; killed when the turn of the third comes, and run again."""
    folder = tmp_path_factory.mktemp("comparison")
    plan = Plan(
        model=str(material / "model"),
        candidates=cross(GRIDS, PLACES, METHODS),
        train=str(material / "train.jsonl"),
        held_out=str(material / "held_out.jsonl"),
        public=str(material / "public.jsonl"),
        training=TrainingSpec(steps=4, batch_size=4, max_length=16),
        learning_rate=1e-2,
        attack_steps=4,
        attack_learning_rate=1e-2,
    )
    before, after = Ear(kill_at="candidate 3"), Ear()
    with pytest.raises(KeyboardInterrupt):
        compare(plan, folder, tell=before)
    return Outcome(compare(plan, folder, tell=after), plan, folder, before, after)


@pytest.mark.slow(alone=True)
def test_where_nothing_is_dropped_emulator_plug_in_and_bound_are_the_same_model(outcome: Outcome) -> None:
    for number in (3, 4):
        figures = outcome.one(number).figures
        assert figures["emulator_zero_shot"] == figures["base_zero_shot"]
        assert figures["emulator_tuned"] == figures["base_tuned"]
        assert figures["plug_in"].held_out.nll == pytest.approx(figures["base_tuned"].held_out.nll, rel=1e-6)
        assert figures["plug_in"].held_out.perplexity < figures["base_zero_shot"].held_out.perplexity


def test_where_a_layer_is_dropped_they_differ(outcome: Outcome) -> None:
    figures = outcome.one(1).figures
    assert len({score.held_out.nll for score in figures.values()}) == 5


def test_what_is_given_away_and_what_it_costs_grow_with_what_is_kept(outcome: Outcome) -> None:
    few, all_ = outcome.one(1), outcome.one(3)
    assert all_.emulated.verbatim == all_.emulated.parameters == few.emulated.parameters > few.emulated.verbatim
    assert (all_.emulated.bytes, all_.client.flops, all_.client.peak_bytes) > (
        few.emulated.bytes,
        few.client.flops,
        few.client.peak_bytes,
    )
    assert few.full.flops == all_.full.flops > all_.client.flops  # fewer maps have adapters than in LoRA everywhere
    assert (few.emulated.layers, few.emulated.trained) == ((0, 1, 3, 4), (0, 4))


def test_an_attack_trains_more_than_a_site_is_asked_to(outcome: Outcome) -> None:
    for number in (1, 3):
        one = outcome.one(number)
        assert [attack.name for attack in one.every_attack] == [
            *("heal 8", "heal 8, unfreeze 4", "heal 8, unfreeze 16", "unfreeze 4", "unfreeze 16"),
            *("tuned, unfreeze 4", "tuned, unfreeze 16"),
        ]
        by_name = {attack.name: attack.score for attack in one.every_attack}
        unfreeze, heal = by_name["unfreeze 4"], by_name["heal 8"]
        assert unfreeze.held_out.nll < one.figures["emulator_tuned"].held_out.nll
        assert heal.general.nll < unfreeze.general.nll and unfreeze.held_out.nll < heal.held_out.nll
        strongest = one.strongest["unfreeze"].score.held_out.nll
        assert strongest == min(score.held_out.nll for score in by_name.values()) < unfreeze.held_out.nll


def test_methods_share_an_emulator_and_its_attacks_but_not_those_on_it_as_it_is_tuned(outcome: Outcome) -> None:
    assert outcome.one(1).emulated == outcome.one(2).emulated
    assert outcome.one(1).attacks != outcome.one(2).attacks
    assert outcome.one(1).figures["plug_in"] != outcome.one(2).figures["plug_in"]


def test_a_candidate_that_cannot_be_built_has_the_reason_in_its_row(outcome: Outcome) -> None:
    assert [row.measured is None for row in outcome.found.rows] == [False] * 4 + [True] * 2
    assert "keep counts all layers" in outcome.found.rows[4].fault and not outcome.found.rows[4].frontier


def test_nothing_is_called_protected_unless_a_threshold_was_stated(outcome: Outcome) -> None:
    for row in outcome.found.rows[:4]:
        assert row.protection and row.protection.label == "not protected"
        assert "no threshold was stated" in row.protection.reason
    assert "no threshold was stated" in outcome.found.reason


def test_a_killed_comparison_goes_on_where_it_was(outcome: Outcome) -> None:
    assert outcome.before.built == ["building uniform(keep=4)"]
    assert "building uniform(keep=4)" not in outcome.after.built
    assert not any((outcome.folder / "unfinished").iterdir())


def test_the_command_finds_what_is_finished_and_writes_the_report(
    outcome: Outcome, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offsite.coordinator.comparison.bench.tuned", None)  # whoever trains fails
    app = typer.Typer()
    app.command()(command)
    arguments = [str(material / "model"), "--out", str(outcome.folder), "--format", "json"]
    arguments += ["--grid", *GRIDS, "--trainable", *PLACES, "--method", METHODS[0], "--method", METHODS[1]]
    for name in ("train", "held-out", "public"):
        arguments += [f"--{name}", str(material / f"{name.replace('-', '_')}.jsonl")]
    arguments += ["--steps", "4", "--learning-rate", "1e-2", "--attack-learning-rate", "1e-2", "--max-length", "16"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert from_json(Comparison, result.stdout, where="stdout") == outcome.found
    assert (outcome.folder / "comparison.json").read_text() == result.stdout.strip()
    page = (outcome.folder / "comparison.html").read_text()
    assert page.count("<svg") == 2 and "uniform(keep=4), blocks" in page and "keep counts all layers" in page


@pytest.mark.parametrize("changed", [{"attack_steps": 1}, {"general": "train"}, {"limit": 1}])
def test_with_other_settings_nothing_that_is_finished_is_taken(
    outcome: Outcome, material: Path, changed: dict[str, object]
) -> None:
    if "general" in changed:
        changed = {"general": str(material / "train.jsonl")}
    with pytest.raises(KeyboardInterrupt):
        compare(replace(outcome.plan, **changed), outcome.folder, tell=Ear(kill_at="building"))


def test_with_another_threshold_everything_that_is_finished_is_taken(outcome: Outcome) -> None:
    plan = replace(outcome.plan, protected_from=0.001, candidates=outcome.plan.candidates[:4])
    found = compare(plan, outcome.folder, tell=Ear(kill_at="building"))
    assert [row.measured for row in found.rows] == [row.measured for row in outcome.found.rows[:4]]
    assert found.recommended is None and "No candidate is protected: the threshold is 0.001 nats" in found.reason


@pytest.mark.parametrize(
    ("grids", "placed", "trained", "fault"),
    [
        (["uniform+crash"], ["ends"], ["lora"], r"uniform\+crash: crash cannot follow uniform"),
        (["uniform(kep=4)"], ["ends"], ["lora"], "has no setting 'kep'"),
        (["uniform"], ["middle"], ["lora"], "there is no placement 'middle'"),
        (["uniform"], ["ends"], ["lora(rank=0)"], "rank must be at least 1"),
        (["uniform"], ["ends+kept"], ["lora"], "expected one choice, found 2"),
        (["crash"], ["ends"], ["grids"], "crash goes with none of the methods grids"),
        (["uniform"], ["ends"], ["lora", "grids"], "grids goes with none of the chains"),
    ],
)
def test_what_cannot_be_composed_is_refused_before_anything_runs(
    grids: list[str], placed: list[str], trained: list[str], fault: str
) -> None:
    with pytest.raises(InputError, match=fault):
        cross(grids, placed, trained)


def test_a_chain_goes_with_the_methods_that_fit_it() -> None:
    names = [candidate.name for candidate in cross(["whole", "sketch"], ["ends"], ["lora", "grids"])]
    assert names == ["whole, ends, lora", "sketch, ends, lora", "sketch, ends, grids"]
