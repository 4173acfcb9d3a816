"""A site's policy: every bound refuses what goes beyond it and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from offsite.client.site.policy import Policy
from offsite.protos.errors import InputError, MismatchError, RefusedError
from offsite.protos.spec import BaseRef, Choice, FileEntry, LocalTraining, Manifest, TaskSpec

BASE, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
POLICY: dict[str, Any] = {
    **{"bases": (BASE,), "data": ("/",), "min_steps": 2},
    **{"max_steps": 10, "max_rounds": 3, "max_upload_mib": 1.0},
}


def task(**changes: Any) -> TaskSpec:
    fields: dict[str, Any] = {
        **{"run": "r", "round": 0, "rounds": 3, "site": "bank", "attempt": 0, "base": BASE},
        **{"manifest": OTHER, "manifest_size": 1, "adapter": OTHER, "adapter_size": 1 << 20, "method_hash": OTHER},
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
        ({"training": LocalTraining(learning_rate=1e-3, steps=2, gradient_clipping=1e-4)}, "min_gradient_clipping"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=2, batch_size=1025)}, "max_batch_size"),
        ({"training": LocalTraining(learning_rate=1e-3, steps=2, max_length=131073)}, "max_length"),
        ({"rounds": 4}, "max_rounds"),
        ({"adapter_size": (1 << 20) + 1}, "max_upload_mib"),
    ],
)
def test_a_task_beyond_a_bound_is_refused_by_name(changes: dict[str, Any], bound: str) -> None:
    with pytest.raises(RefusedError, match=rf"refuses the task \({bound}\)"):
        Policy(**POLICY).check_task(task(**changes))


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


def test_the_policy_of_the_docs_says_what_happens_to_suspicious_emulators(tmp_path: Path) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "policy.toml").read_text()
    file = tmp_path / "policy.toml"
    file.write_text(documented.replace("/srv/offsite/data", str(tmp_path)))
    policy = Policy.load(file)
    assert (policy.suspicious, policy.max_emulator_perplexity) == ("refuse", None)
    file.write_text(file.read_text().replace("# max_emu", "max_emu").replace('"refuse"', '"warn"'))
    told = dict(Policy.load(file).describe())
    assert (told["highest perplexity"], told["suspicious emulators"]) == ("5000", "trained on, with a warning")
    file.write_text(file.read_text().replace('"warn"', '"ignore"'))
    with pytest.raises(InputError, match="suspicious: Input should be 'refuse' or 'warn'"):
        Policy.load(file)


def test_a_policy_file_needs_its_folders(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(f'bases = ["any"]\ndata = ["{tmp_path}/none"]\n')
    with pytest.raises(InputError, match="none is not a folder"):
        Policy.load(tmp_path / "policy.toml")
