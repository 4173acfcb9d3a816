"""Which stages of an upload a run may ask for."""

import re
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offsite.coordinator.runs import legality
from offsite.emulator.catalogue import METHODS
from offsite.kernels.schema import Schema
from offsite.protos.errors import InputError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Choice, RunSpec, TrainingSpec

WHOLE = Choice(name="whole")
STAGES: dict[str, Any] = {
    "mask": SimpleNamespace(name="mask", hides=True, phases=("keys", "train", "unmask"), noise=0.0),
    "late": SimpleNamespace(name="late", hides=False, phases=("train", "after"), noise=0.0),
}


@pytest.mark.parametrize(
    ("strategy", "stage", "words"),
    [
        (
            "low-rank",
            "mask",
            "stage mask hides all but a sum, and strategy low-rank must see each update; use factor-mean",
        ),
        ("factor-mean", "mask", "stage mask hides all but a sum, and rounds unpack each update by itself so far"),
        ("low-rank", "late", "stage late works in the phases train, after, and a round has train alone so far"),
    ],
)
def test_a_stage_that_asks_more_of_a_round_than_it_does_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, strategy: str, stage: str, words: str
) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    monkeypatch.setattr(legality.upload, "make", lambda chain: [STAGES[choice.name] for choice in chain])
    spec = RunSpec(model="nowhere", strategy=Choice(name=strategy), upload=(Choice(name=stage),), builders=(WHOLE,))
    with pytest.raises(InputError, match=words):
        legality.judge(spec)


def test_a_stage_that_is_not_known_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    spec = RunSpec(model="nowhere", builders=(WHOLE,), upload=(Choice(name="nosie"),))
    with pytest.raises(InputError, match="upload: there is no stage 'nosie' .did you mean noise.*; known are noise"):
        legality.judge(spec)


class Picky:
    """A stage that packs no tensor of one row, and no norm."""

    hides, phases, whole, noise, feedback = False, ("train",), False, 0.0, False

    def schema(self, given: Schema) -> Schema:
        for key, field in given.items():
            if "norm" in key or field.shape[0] == 1:
                raise ValueError(f"tensor {key} of shape {list(field.shape)} cannot be packed")
        return given


@pytest.mark.parametrize(
    ("method", "settings", "sites", "words"),
    [
        ("lora", {}, (), ""),
        ("lora", {"rank": 1}, (), r"upload: tensor 0.mlp.down_proj.A of shape \[1, 32\] cannot be packed"),
        ("lora", {"ranks": {"bank": 1}}, ("bank", "ward"), r"upload: tensor 0.mlp.down_proj.A of shape \[1, 32\]"),
        ("lora", {"ranks": {"bank": 1}}, ("town", "ward"), ""),
        ("lora", {"rank": 2, "init": "pissa"}, (), ""),
        ("lora", {"rank": 1, "init": "olora"}, (), r"upload: tensor 0.mlp.down_proj.A0? of shape \[1, 32\]"),
        ("lora", {"rank": 17, "init": "pissa"}, (), r"rank 17 is more than 0.self_attn.q_proj \(16, 16\) has, 16"),
        ("blocks", {}, (), r"upload: tensor 0.input_layernorm.weight of shape \[16\] cannot be packed"),
        ("sparse", {"entries": 1}, (), ""),  # its start's values are part of its schema: the build tells
        ("sara", {}, (), ""),  # its start depends on the weights' values: likewise
    ],
)
def test_a_stage_that_cannot_pack_what_sites_send_is_refused_before_anything_is_built(
    material: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, Any],
    sites: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "plugin")
    monkeypatch.setitem(METHODS._points, "sparse", [EntryPoint("sparse", "offsite_sparse:Sparse", METHODS.group)])
    monkeypatch.setattr(legality.upload, "make", lambda chain: [Picky() for _ in chain])
    spec = RunSpec(
        model=str(material / "model"),
        builders=(WHOLE,),
        method=Choice(name=method, settings=settings),
        strategy=Choice(name="low-rank" if method == "lora" else "mean"),
        sites=sites,
        upload=(Choice(name="picky"),),
        training=TrainingSpec(max_length=32),
    )
    with pytest.raises(InputError, match=words) if words else nullcontext():
        legality.judge(spec)


def test_a_schedule_that_no_round_is_long_enough_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    training = TrainingSpec(steps=8, warmup_steps=8)
    spec = RunSpec(model="nowhere", builders=(WHOLE,), training=training)
    legality.judge(spec)
    falling = replace(training, schedule=Choice(name="cosine"))
    legality.judge(replace(spec, training=replace(falling, warmup_steps=7)))
    with pytest.raises(InputError, match="cosine falls after the warm-up, and warmup_steps is 8 of 8 steps; give"):
        legality.judge(replace(spec, training=falling))
    over = replace(falling, span="run")
    legality.judge(replace(spec, training=over, rounds=2))
    with pytest.raises(InputError, match="warmup_steps is 8 of 8 steps"):
        legality.judge(replace(spec, training=over))
    with pytest.raises(InputError, match="a schedule over a run of .* steps is too long; ask for fewer rounds"):
        legality.judge(replace(spec, training=replace(over, steps=2**31 - 1), rounds=2**31 - 1))
    with pytest.raises(InputError, match="there is no schedule 'cosin' .did you mean cosine"):
        legality.judge(replace(spec, training=replace(training, schedule=Choice(name="cosin"))))


def test_an_optimiser_is_known_and_has_a_rate_where_none_of_a_method_suits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    training = TrainingSpec(optimiser=Choice(name="spsa-gc"))
    spec = RunSpec(model="nowhere", builders=(WHOLE,), training=training)
    with pytest.raises(InputError, match=r"the steps of spsa-gc are as long as .*: give training\.learning_rate"):
        legality.judge(spec)
    legality.judge(replace(spec, training=replace(training, learning_rate=1e-3)))
    legality.judge(replace(spec, training=replace(training, optimiser=Choice(name="natural-galore"))))
    with pytest.raises(InputError, match="there is no optimiser 'adam' .did you mean adamw"):
        legality.judge(replace(spec, training=replace(training, optimiser=Choice(name="adam"))))


@pytest.mark.parametrize(
    ("part", "refused"),
    [("ist", True), ("lisa(per=site)", True), ("half", False), ("all", False), ("by-capability", False)],
)
def test_sites_that_move_along_the_same_directions_train_the_same_part(
    monkeypatch: pytest.MonkeyPatch, part: str, refused: bool
) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    training = TrainingSpec(optimiser=Choice(name="spsa-gc"), learning_rate=1e-3, part=parse_one(part))
    spec = RunSpec(model="nowhere", builders=(WHOLE,), training=training)
    words = (
        "spsa-gc all sites move .* one of the parts all, by-capability, by-task, half, lisa, .* one of the optimisers "
        "adamw, natural-galore$"
    )
    with pytest.raises(InputError, match=words) if refused else nullcontext():
        legality.judge(spec)
    legality.judge(replace(spec, training=replace(training, optimiser=Choice(name="adamw"))))


def test_a_part_that_names_a_site_which_the_run_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    spec = RunSpec(model="nowhere", builders=(WHOLE,), sites=("bank", "clinic"), strategy=Choice(name="low-rank"))

    def carried(site: str) -> RunSpec:
        return replace(spec, training=TrainingSpec(part=Choice(name="by-capability", settings={"sites": {site: 2}})))

    legality.judge(carried("clinic"))
    legality.judge(replace(carried("clinik"), sites=()))  # whoever is enrolled by then
    with pytest.raises(InputError, match="says what site 'clinik' trains, and the run has no .*; did you mean clinic"):
        legality.judge(carried("clinik"))


def test_squares_are_measured_of_values_that_mean_the_same_in_the_next_round() -> None:
    fisher = RunSpec(model="m", method=Choice(name="fisher"), strategy=Choice(name="sum"), start="lora")
    why = legality.beginning(fisher)
    lora = RunSpec(model="m", method=Choice(name="lora", settings={}))
    assert why and why(replace(lora, strategy=Choice(name="factor-mean"))) == why(replace(fisher, start="sums")) == ""
    assert re.search(
        "is of strategy low-rank, which writes .* fisher measures .*; name a run of factor-mean", why(lora)
    )


def test_a_part_of_what_has_been_learned_already_needs_a_version_to_go_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    training = TrainingSpec(part=Choice(name="by-task"))
    named = {"method": Choice(name="mhr"), "strategy": Choice(name="mean"), "training": training}
    spec = RunSpec(model="nowhere", builders=(WHOLE,), **named)
    with pytest.raises(
        InputError, match="by-task trains what does nothing without the rest, .* name a run of the method mhr"
    ):
        legality.judge(spec)
    legality.judge(replace(spec, start="before"))


def test_an_objective_that_compares_answers_goes_without_text_that_the_base_is_tuned_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    spec = RunSpec(model="nowhere", builders=(WHOLE,), training=TrainingSpec(objective=Choice(name="dpo")))
    legality.judge(spec)
    with pytest.raises(InputError, match="attack_text: .* the objective dpo compares answers, .* leave it out"):
        legality.judge(replace(spec, attack_text="task.jsonl", attack_steps=4))
    with pytest.raises(InputError, match="there is no objective 'ppo'"):
        legality.judge(replace(spec, training=TrainingSpec(objective=Choice(name="ppo"))))


def test_a_merged_model_of_what_weights_cannot_take_in_is_refused_with_what_to_do_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    spec = RunSpec(model="nowhere", builders=(WHOLE,), merge=True)
    legality.judge(spec)
    monkeypatch.setattr(METHODS["lora"], "mergeable", False)
    with pytest.raises(InputError, match="merge: what lora trains is no change of the base's weights.*leave merge out"):
        legality.judge(spec)
    legality.judge(replace(spec, merge=False))


@pytest.mark.parametrize(
    ("builder", "settings", "words"),
    [
        (
            "quantised",
            {"layers": "all", "block": 16},
            r"blocks cannot train layers that are stored in few bits, as the builder quantised leaves layers 0, 1, 3, "
            r"4; have it leave those that train as they are, or use one of the methods .*lora",
        ),
        ("loram", {"first": 0, "last": 2}, r"layers that are narrowed, as the builder loram leaves layers 0, 1;"),
        ("loram", {}, ""),  # which leaves the ends whole
    ],
)
def test_a_method_that_cannot_train_what_a_builder_alters_is_refused_with_those_that_can(
    material: Path, builder: str, settings: dict[str, Any], words: str
) -> None:
    spec = RunSpec(
        model=str(material / "model"),
        builders=(WHOLE, Choice(name=builder, settings=settings)),
        method=Choice(name="blocks"),
        strategy=Choice(name="mean"),
        training=TrainingSpec(max_length=32),
    )
    with pytest.raises(InputError, match=words) if words else nullcontext():
        legality.judge(spec)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quorum": 1, "min_sites": 2}, "quorum is 1: a round with fewer updates than min_sites, which is 2, fails"),
        ({"quorum": 3, "sites": ("bank", "ward")}, "quorum is 3, but only 2 sites are named"),
        ({"join": True, "sites": ("bank",)}, "join: a run that names its sites has no others"),
        ({"spare": 0.5}, "spare: more sites than all cannot be drawn; give sites_per_round"),
        ({"sites_per_round": 2, "quorum": 3}, "sites_per_round is 2, and a round is to have at least 3 updates"),
        ({"staleness": 1}, "staleness: nobody is late where all are waited for; give a quorum"),
        (
            {"staleness": 1, "quorum": 2, "method": "shira", "strategy": "index-union"},
            "staleness: strategy index-union is no weighted sum of updates.*; use factor-mean, low-rank, mean",
        ),
        ({"staleness": 1, "quorum": 2, "part": "half"}, "staleness: part half trains other tensors in each round"),
        ({"staleness": 1, "quorum": 2, "contributions": True}, "staleness: contributions are measured of rounds whose"),
    ],
)
def test_what_no_round_can_wait_for_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(legality.zoo, "look_up", lambda *_, **__: None)
    training = TrainingSpec(part=parse_one(fields.pop("part"))) if "part" in fields else TrainingSpec()
    chosen = {name: Choice(name=fields.pop(name)) for name in ("method", "strategy") if name in fields}
    with pytest.raises(InputError, match=words):
        legality.judge(RunSpec(model="nowhere", builders=(WHOLE,), training=training, **chosen, **fields))
