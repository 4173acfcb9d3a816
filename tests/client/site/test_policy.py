"""A site's policy: every bound refuses what goes beyond it and nothing else."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from offsite.client.site.policy import Policy, refusal
from offsite.client.site.reasons import reason
from offsite.coordinator.service.reasons import sentence
from offsite.protos import fleet_pb2 as pb
from offsite.protos.errors import InputError, MismatchError, RefusedError
from offsite.protos.spec import Ancestor, BaseRef, Choice, FileEntry, LocalTraining, Manifest, TaskSpec

BASE, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
POLICY: dict[str, Any] = {
    **{"bases": (BASE,), "data": ("/",), "min_steps": 2},
    **{"max_steps": 10, "max_rounds": 3, "max_upload_mib": 1.0},
}


def task(**changes: Any) -> TaskSpec:
    fields: dict[str, Any] = {
        **{"run": "r", "round": 0, "rounds": 3, "site": "bank", "attempt": 0, "base": BASE},
        **{"manifest": OTHER, "manifest_size": 1, "adapter": OTHER, "adapter_size": 1 << 20, "method_hash": OTHER},
        "update_size": 1 << 20,
        **{"method": Choice(name="lora"), "training": LocalTraining(learning_rate=1e-3, steps=10)},
    }
    return TaskSpec(**{**fields, **changes})


def manifest(*, size: int = 1, path: str = "model.safetensors", **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "base": BaseRef(name="m", digest=BASE, layers=4, parameters=9),
        "builders": (Choice(name="uniform"),),
        "layers": (0, 2, 3),
        "trainable": (0, 3),
        **{"parameters": 7, "verbatim": 7, "lossy": 0},
        "files": (FileEntry(path=path, digest=OTHER, size=size),),
    }
    return Manifest(**{**fields, **changes})


def test_what_is_within_every_bound_is_allowed() -> None:
    policy = Policy(**POLICY)
    policy.check_task(task())
    policy.check_bundle(task(), manifest())
    policy.check_update(1 << 20)
    Policy(**POLICY | {"bases": ("any",)}).check_task(task(base=OTHER))


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"base": OTHER}, "bases"),
        ({"method": Choice(name="blocks")}, "methods"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=11)}, "max_steps"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=1)}, "min_steps"),
        ({"training": LocalTraining(learning_rate=6e-3, steps=2)}, "max_learning_rate"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=2, batch_size=3)}, "min_batch_size"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=2, max_length=31)}, "min_length"),
        ({"round": 3}, "max_rounds"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=2, gradient_clipping=1e-4)}, "min_gradient_clipping"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=2, batch_size=1025)}, "max_batch_size"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=2, max_length=131073)}, "max_length"),
        ({"rounds": 4}, "max_rounds"),
        ({"rounds": 2, "continues": Ancestor(run="old", round=1, rounds=2)}, "max_rounds"),
        ({"update_size": (1 << 20) + 1}, "max_upload_mib"),
    ],
)
def test_a_task_beyond_a_bound_is_refused_by_name(changes: dict[str, Any], bound: str) -> None:
    with pytest.raises(RefusedError, match=rf"refuses the task \({bound}\)"):
        Policy(**POLICY).check_task(task(**changes))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("round", [0, 1, 9])
def test_by_default_a_task_of_few_steps_is_refused_in_every_round(steps: int, round: int) -> None:
    policy = Policy(bases=("any",), data=("/",))
    short = LocalTraining(learning_rate=1e-3, steps=steps)
    with pytest.raises(RefusedError, match=rf"\(min_steps\): steps a round: {steps} asked for, at least 4") as caught:
        policy.check_task(task(round=round, rounds=10, training=short))
    assert reason(caught.value) == "BOUND_MIN_STEPS"


@pytest.mark.parametrize("steps", [4, 5, 40])
@pytest.mark.parametrize("warmup", [0, 1, 3, 40, 4000])
def test_a_warm_up_alone_is_never_too_few_steps(steps: int, warmup: int) -> None:
    Policy(bases=("any",), data=("/",)).check_shares([min(1.0, (at + 1) / (warmup + 1)) for at in range(steps)])


def test_steps_are_counted_by_their_shares_of_the_rate() -> None:
    policy = Policy(**POLICY | {"min_steps": 8})
    policy.check_shares([0.5] * 6)  # a constant rate is one of six steps whatever it is: 6 of 8 times 3/4
    with pytest.raises(RefusedError, match=r"\(min_steps\): .*: 9 count as 5, at least 6 allowed") as caught:
        policy.check_shares([0.2] * 5 + [0.0] * 4)
    assert reason(caught.value) == "BOUND_MIN_STEPS"


def noise(share: float) -> Choice:
    return Choice(name="noise", settings={"share": share})


@pytest.mark.parametrize("upload", [(), (noise(0.009),)])
def test_an_update_with_less_noise_than_a_site_asks_for_is_refused(upload: tuple[Choice, ...]) -> None:
    policy = Policy(**POLICY | {"min_noise": 0.01})
    policy.check_task(task(upload=(Choice(name="noise"),)))
    policy.check_task(task(upload=(noise(0.001), noise(0.02))))
    with pytest.raises(RefusedError, match=r"\(min_noise\): noise on the update: .*, at least 0.01") as caught:
        policy.check_task(task(upload=upload))
    assert reason(caught.value) == "BOUND_MIN_NOISE"


def test_a_stage_that_this_site_does_not_know_is_named() -> None:
    with pytest.raises(InputError, match="there is no stage 'nosie' .did you mean noise.*; known are noise"):
        Policy(**POLICY).check_task(task(upload=(Choice(name="nosie"),)))


def test_a_run_that_goes_on_from_another_ones_is_allowed_unless_the_site_says_no() -> None:
    asked = task(rounds=1, continues=Ancestor(run="old", round=2, rounds=2))
    Policy(**POLICY).check_task(asked)
    with pytest.raises(RefusedError, match=r"\(continued\): the run goes on from round 2 of old") as caught:
        Policy(**POLICY | {"continued": False}).check_task(asked)
    assert reason(caught.value) == "BOUND_CONTINUED"


def test_few_distinct_sequences_or_many_passes_are_refused() -> None:
    policy = Policy(bases=("any",), data=("/",))
    asked = task(rounds=2, training=LocalTraining(learning_rate=1e-3, steps=8))  # 64 sequences in all
    policy.check_rows(asked, seen=12, distinct=16)
    with pytest.raises(RefusedError, match=r"\(min_rows\): the round sees 11 distinct"):
        policy.check_rows(asked, seen=11, distinct=99)
    after = task(rounds=1, continues=Ancestor(run="old", round=1, rounds=1), training=asked.training)
    policy.check_rows(after, seen=12, distinct=16)
    with pytest.raises(RefusedError, match=r"\(max_passes\): 4.27 passes over 15 .* in 2 rounds are more than 4"):
        policy.check_rows(after, seen=16, distinct=15)
    with pytest.raises(RefusedError, match=r"\(max_passes\): 4.27 passes over 15 .* in 2 rounds are more than 4"):
        policy.check_rows(asked, seen=16, distinct=15)


def test_an_update_or_a_bundle_that_is_too_large_is_refused() -> None:
    with pytest.raises(RefusedError, match="max_upload_mib"):
        Policy(**POLICY).check_update((1 << 20) + 1)
    with pytest.raises(RefusedError, match="max_bundle_mib"):
        Policy(**POLICY | {"max_bundle_mib": 2.0}).check_bundle(task(), manifest(size=3 << 20))


@pytest.mark.parametrize("path", ["/etc/passwd", "../../x", "a/../../x", "modeling_evil.py", "", ".ssh/x"])
def test_a_bundle_cannot_write_elsewhere_or_bring_code(path: str) -> None:
    with pytest.raises(MismatchError, match="a file that it must not"):
        Policy(**POLICY).check_bundle(task(), manifest(path=path))


def test_a_bundle_of_another_base_or_with_layers_it_lacks_is_a_mismatch() -> None:
    with pytest.raises(MismatchError, match="the bundle is of base"):
        Policy(**POLICY).check_bundle(task(base=OTHER), manifest())
    with pytest.raises(MismatchError, match=r"layers \[1\]"):
        Policy(**POLICY).check_bundle(task(), manifest(trainable=(0, 1)))


def test_data_is_looked_for_behind_links(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "secret.jsonl").write_text("{}")
    (tmp_path / "allowed" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "allowed" / "fine.jsonl").write_text("{}")
    policy = Policy(**POLICY | {"data": (str(tmp_path / "allowed"),)})
    policy.check_data(tmp_path / "allowed" / "fine.jsonl")
    with pytest.raises(RefusedError, match="allows data only in"):
        policy.check_data(tmp_path / "allowed" / "link.jsonl")


DOCUMENTED = (Path(__file__).parents[3] / "docs" / "policy.toml").read_text()


def test_what_the_documented_file_says_is_what_a_field_left_out_means(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(DOCUMENTED.replace("/srv/offsite/data", "."))
    assert Policy.load(file) == Policy(bases=("any",), data=(str(tmp_path),))
    names = {field.name for field in fields(Policy)}
    assert names == set(re.findall(r"^(?:# )?(\w+) = ", DOCUMENTED, re.MULTILINE))


def test_the_table_has_every_field_with_a_sentence() -> None:
    told = {name: (value, why) for name, value, why in Policy(bases=("any",), data=("/",)).describe()}
    assert told.keys() == {field.name for field in fields(Policy)}
    assert told["min_steps"][0] == "4" and "gradient" in told["min_steps"][1]
    assert (told["max_emulator_perplexity"][0], told["per_step_metrics"][0]) == ("none", "no")
    assert all(len(why) > 10 for _, why in told.values())


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("max_steps = true", "max_steps: Input should be a valid integer (got True)"),
        ("min_steps = 50\nmax_steps = 10", "min_steps = 50 is more than max_steps = 10"),
        ("min_batch_size = 65", "min_batch_size = 65 is more than max_batch_size = 64"),
        ('methods = ["lorra"]', "there is no method 'lorra'; did you mean lora?"),
        ("max_upload_mib = inf", "inf"),
        ("max_passes = 0", "max_passes"),
        ("min_noise = -1.0", "min_noise"),
        ("max_steps = 5000000000", "max_steps"),
        ('suspicious = "ignore"', "suspicious: Input should be 'refuse' or 'warn'"),
        ("max_step = 5", "did you mean max_steps?"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused_in_a_sentence(tmp_path: Path, lines: str, words: str) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(f'bases = ["any"]\ndata = ["."]\n{lines}\n')
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        Policy.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_are_beside_the_file_wherever_the_agent_runs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "policy.toml"
    file.write_text('\ufeffbases = ["any"]\ndata = ["data"]\n', encoding="utf-8")
    assert Policy.load(file).data == (str(tmp_path / "data"),)
    file.write_text('bases = ["any"]\ndata = "data"\n')
    with pytest.raises(InputError, match=r"data: expected a list \(got 'data'\)"):
        Policy.load(file)
    file.write_text('bases = ["any"]\ndata = ["none"]\n')
    with pytest.raises(InputError, match="none is not a folder"):
        Policy.load(file)


def test_every_refusal_has_a_name_on_the_wire_and_a_sentence_at_the_coordinator() -> None:
    bounds = {name.removeprefix("BOUND_").lower() for name in pb.Reason.keys() if name.startswith("BOUND_")}
    settings = {
        "odd_rows",
        "columns",
        "per_step_metrics",
        "usage",
        "logs",
        "keep_bundles_mib",
        "keep_days",
    }  # not bounds of a task
    settings |= {"held_out", "min_held_out", "figures", "figure_epsilon"}
    assert bounds == {field.name for field in fields(Policy)} - settings
    assert reason(refusal("min_rows", "why")) == "BOUND_MIN_ROWS"
    said = {sentence(number) for number in pb.Reason.values() if number}
    assert len(said) == len(pb.Reason.values()) - 1 and not any("unknown" in one for one in said)
    assert "(min_steps)" in sentence(pb.BOUND_MIN_STEPS) and "unknown" in sentence(999)
