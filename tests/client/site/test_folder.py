"""A site's work folder: one site's, one process's, nobody else's to read, and never larger than its policy says."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offsite.client.site.folder import WorkFolder
from offsite.client.site.policy import Policy
from offsite.protos.errors import ConflictError, ResourceError

TASK: Any = SimpleNamespace(run="r", round=1, attempt=0, manifest="sha256:" + "a" * 64, adapter="sha256:" + "b" * 64)
FIRST, SECOND, THIRD = (f"blake3:{digit * 64}" for digit in "123")


def kit(name: str, authority: bytes = b"one") -> Any:
    return SimpleNamespace(name=name, authority=authority)


def filled(path: Path, *, size: int = 1, age_s: float = 0.0) -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * size)
    path.with_suffix(".json").write_text("{}")
    now = path.stat().st_mtime
    os.utime(path, (now - age_s, now - age_s))
    return path


def test_a_folder_in_use_or_of_another_site_is_refused_by_name(tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", kit("bank"))
    for name in ("bank", "hospital"):
        with pytest.raises(ResourceError, match=rf"as process {os.getpid()}, works in this folder; .* --work"):
            WorkFolder.open(tmp_path / "work", kit(name))
    folder.close()
    WorkFolder.open(tmp_path / "work", kit("bank")).close()  # and so may a kit that was issued again
    with pytest.raises(ConflictError, match="the work folder of site bank; name another for hospital"):
        WorkFolder.open(tmp_path / "work", kit("hospital"))
    with pytest.raises(ConflictError, match="site bank of another authority"):
        WorkFolder.open(tmp_path / "work", kit("bank", b"two"))
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ConflictError, match="not empty, and not a site's work folder"):
        WorkFolder.open(tmp_path, kit("bank"))


def test_what_a_download_may_hold_much_of_is_the_newest_of_its_kind(tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", kit("bank"))
    bundle, adapter = folder.bundle(TASK), folder.adapter(TASK)
    assert folder.earlier(adapter) is None and folder.earlier(bundle / "model.safetensors") is None
    filled(bundle.with_name("old"), age_s=9)
    new = filled(bundle.with_name("new"))
    os.utime(bundle.with_name("old") / "model.safetensors", (1, 1))
    adapter.parent.mkdir()
    for name in ("one", "two"):
        adapter.with_stem(name).write_text(name)
    os.utime(adapter.with_stem("one"), (1, 1))
    assert folder.earlier(bundle / "model.safetensors") == new / "model.safetensors"
    assert folder.earlier(bundle / "tokenizer.json") is None
    assert folder.earlier(bundle.with_suffix(".json")).name in ("old.json", "new.json")  # type: ignore[union-attr]
    assert folder.earlier(adapter) == adapter.with_stem("two")
    folder.clear_tasks()
    assert [file.name for file in adapter.parent.iterdir()] == ["two.safetensors"], "one is kept for the next"
    folder.close()


def test_only_the_sites_own_user_reads_the_folder_and_its_log(tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", kit("bank"))
    folder.write("failed", {"message": "line 3: 'a private sentence'"})
    folder.close()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder.path, folder.path / "site.log")}
    assert modes == {"work": 0o700, "site.log": 0o600}
    assert "a private sentence" in (folder.path / "site.log").read_text()


def test_a_site_draws_its_secret_once_and_keeps_it_to_itself(tmp_path: Path) -> None:
    secrets = []
    for name in ("bank", "bank", "hospital"):
        folder = WorkFolder.open(tmp_path / name, kit(name))
        folder.clear_tasks()
        secrets.append(folder.secret.read_bytes())
        assert folder.secret.stat().st_mode & 0o777 == 0o600 and len(secrets[-1]) == 32
        folder.close()
    assert secrets[0] == secrets[1] != secrets[2]
    folder.secret.write_bytes(b"")
    with pytest.raises(ConflictError, match="secret: not the 32 bytes .* restore it"):
        WorkFolder.open(tmp_path / "hospital", kit("hospital"))


def test_what_no_task_needs_goes_and_what_the_next_round_needs_stays(tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", kit("bank"))
    folder.task(TASK).mkdir(parents=True)
    folder.adapter(TASK).parent.mkdir()
    folder.adapter(TASK).write_text("x")
    used = filled(folder.bundle(TASK))
    left = folder.path / "tasks" / "ended" / "round-0-0"
    left.mkdir(parents=True)
    folder.clear(TASK)
    assert not folder.task(TASK).exists() and folder.adapter(TASK).exists() and left.exists() and used.exists()
    folder.clear_tasks()
    assert not left.exists() and used.exists()
    folder.close()


def test_emulators_go_by_age_and_by_size_the_oldest_first(tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", kit("bank"))
    bundles = folder.path / "bundles"
    policy = Policy(bases=("any",), data=(), keep_bundles_mib=2.5, keep_days=10.0)

    def kept() -> set[str]:
        return {path.name for path in bundles.iterdir()}

    filled(bundles / "ancient", age_s=11 * 86_400)
    for age, name in enumerate(("new", "middle", "old")):
        filled(bundles / name, size=1 << 20, age_s=age * 100.0)
    folder.clear_bundles(policy)
    assert kept() == {"new", "new.json", "middle", "middle.json"}
    folder.clear_bundles(Policy(bases=("any",), data=(), keep_bundles_mib=0.5), used=bundles / "middle")
    assert kept() == {"middle", "middle.json"}, "what is in use stays, however large"
    shutil.rmtree(bundles)
    folder.clear_bundles(policy)
    folder.close()


def residual(folder: WorkFolder, round: int, update: str, *, attempt: int = 0) -> Path:
    """Have a task of a round leave something out of its update, and return where that is kept."""
    task: Any = SimpleNamespace(run="r", round=round, attempt=attempt)
    folder.task(task).mkdir(parents=True)
    (folder.task(task) / "residual.safetensors").write_text(update)
    folder.keep_residual(task, update)
    folder.keep_residual(task, update)  # as an agent does that was killed before its upload
    assert (kept := folder.residual(task, update)).read_text() == update
    return kept


def taken(folder: WorkFolder, previous: str | None, *, run: str = "r") -> None:
    """Begin a task of a run that has an update."""
    folder.clear_residuals(SimpleNamespace(run=run, previous=previous))  # type: ignore[arg-type]


def test_what_was_left_out_is_kept_until_a_later_update_is_the_runs_newest(tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", kit("bank"))
    first, second = residual(folder, 0, FIRST), residual(folder, 1, SECOND)
    folder.clear_tasks()
    taken(folder, FIRST)  # the second was refused, or lost at the coordinator: its round begins again
    assert first.exists() and not second.exists()
    third = residual(folder, 1, THIRD, attempt=1)
    assert first.exists() and third.exists(), "nobody knows yet whether the third will count"
    taken(folder, THIRD)
    assert third.exists() and not first.exists()
    taken(folder, None, run="another")
    assert third.exists(), "of another run"
    taken(folder, None)
    assert not third.exists()
    folder.close()


def test_what_was_left_out_goes_with_age(tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", kit("bank"))
    kept, policy = residual(folder, 0, FIRST), Policy(bases=("any",), data=(), keep_days=10.0)
    folder.clear_bundles(policy)
    assert kept.exists()
    os.utime(kept.parent, (1, 1))
    folder.clear_bundles(policy)
    assert not kept.parent.exists()
    folder.close()
