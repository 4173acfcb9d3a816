"""A person's and a site's doctor: each thing that can be wrong is made wrong, and said to be so with its exit code."""

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from offsite.client.commands import doctor
from offsite.protos import checks
from offsite.protos.security import register
from offsite.protos.security.pki import Authority


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing but what a test names."""
    for name in ("PROFILE", "COORDINATOR", "IDENTITY"):
        monkeypatch.setenv(f"OFFSITE_{name}", "")
    monkeypatch.setenv("OFFSITE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """What a site has, all of it in order."""
    authority = Authority.create(tmp_path / "pki")
    (tmp_path / "policy.toml").write_text(f'bases = ["any"]\ndata = ["{tmp_path}"]\nmin_rows = 2\n')
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    return {
        "--identity": str(authority.issue("site", "ward")),
        "--policy": str(tmp_path / "policy.toml"),
        "--data": str(tmp_path / "data.jsonl"),
        "--work": str(tmp_path / "not" / "yet"),
        "--disk": "0.001",
        "--memory": "0.001",
    }


def looked(offsite: Any, options: dict[str, str], *more: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and of each check its verdict and what it says."""
    told = offsite("doctor", *(part for pair in options.items() for part in pair), *more, "--format", "json")
    rows = json.loads(told.stdout)
    assert all(row.keys() == {"name", "verdict", "message", "code"} for row in rows)
    return told.returncode, {row["name"]: (row["verdict"], row["message"]) for row in rows}


def test_where_nothing_is_wrong_each_line_says_what_is_so(offsite: Any, site: dict[str, str], tmp_path: Path) -> None:
    code, seen = looked(offsite, site)
    assert code == 0 and {verdict for verdict, _ in seen.values()} == {"ok"}, seen
    assert [*seen] == ["versions", "kit", "policy", "data", "disk", "memory", "gpu", "compilation"]
    assert "site 'ward', until " in seen["kit"][1] and "2 examples" in seen["data"][1]
    told = offsite("doctor", "--disk", "0", "--memory", "0", "--work", str(tmp_path))
    assert [line.split()[:2] for line in told.stdout.splitlines()] == [
        ["ok", "versions"],
        ["ok", "disk"],
        ["ok", "memory"],
    ]


def test_what_is_wrong_fails_by_name_and_the_exit_code_is_the_highest(
    offsite: Any, site: dict[str, str], tmp_path: Path
) -> None:
    lapsed = Authority.open(tmp_path / "pki").issue("site", "lapsed", _at=datetime.now(UTC) - timedelta(days=400))
    (tmp_path / "odd.toml").write_text('bases = ["any"]\ndata = []\nmax_step = 5\n')
    wrong = {"--identity": str(lapsed), "--policy": str(tmp_path / "odd.toml"), "--disk": "1e9", "--memory": "1e9"}
    code, seen = looked(offsite, site | wrong)
    assert code == 8 and {name for name, (verdict, _) in seen.items() if verdict == "fail"} == {
        *("kit", "policy", "data", "disk", "memory"),
    }
    assert "'lapsed' expired on" in seen["kit"][1] and "did you mean max_steps?" in seen["policy"][1]
    assert "1e+09 GB are wanted; make room" in seen["disk"][1] and "are wanted" in seen["memory"][1]
    (tmp_path / "narrow.toml").write_text(f'bases = ["any"]\ndata = ["{tmp_path / "pki"}"]\n')
    code, seen = looked(offsite, site | {"--policy": str(tmp_path / "narrow.toml")})
    assert code == 5 and "the policy allows data only in" in seen["data"][1]
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    code, seen = looked(offsite, site | {"--data": str(tmp_path / "broken.jsonl")})
    assert code == 3 and "broken.jsonl, line 1" in seen["data"][1]
    alice = Authority.open(tmp_path / "pki").issue("researcher", "alice")
    code, seen = looked(offsite, site | {"--identity": str(alice)})
    assert code == 4 and "the kit of researcher 'alice'; here one of site is needed" in seen["kit"][1]


def test_a_coordinator_that_is_not_there_and_a_list_that_has_ended_are_said_to_be_so(
    offsite: Any, site: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.2)
    code, seen = looked(offsite, site, "--coordinator", "127.0.0.1:1")
    assert code == 9 and seen["coordinator"][0] == "fail" and "nothing listens there" in seen["coordinator"][1]
    monkeypatch.setattr(register, "now", lambda: datetime.now(UTC) - timedelta(days=9))
    Authority.open(tmp_path / "pki").refresh(days=1)
    code, seen = looked(offsite, site)
    assert code == 4 and "the list of certificates held until" in seen["kit"][1]


def test_what_hinders_nothing_yet_is_a_warning(offsite: Any, site: dict[str, str], tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "one"}\n')
    code, seen = looked(offsite, site | {"--data": str(few)})
    assert code == 0 and seen["data"][0] == "warn" and "(min_rows)" in seen["data"][1]
    assert seen["compilation"][0] == "ok", "it may be at work"
    os.utime(lock, (time.time() - checks.STALE_S - 1,) * 2)
    code, seen = looked(offsite, site)
    assert code == 0 and seen["compilation"][0] == "warn" and f"{lock}: left by" in seen["compilation"][1]


def test_a_profile_says_whom_to_ask(offsite: Any, site: dict[str, str]) -> None:
    offsite("identity", "profile", "add", "work", "--identity", site["--identity"])
    _, seen = looked(offsite, {"--disk": "0", "--memory": "0"})
    assert "'ward'" in seen["kit"][1]


def test_a_package_that_is_missing_and_a_folder_that_cannot_be_made_fail(tmp_path: Path) -> None:
    absent = checks.check("versions", lambda: checks.versions("no-such-package"))
    assert (absent.verdict, absent.code) == ("fail", 8) and absent.message.startswith("no-such-package: not installed")
    (tmp_path / "file").touch()
    barred = checks.check("disk", lambda: checks.disk(tmp_path / "file" / "work", least_gb=0))
    assert (barred.verdict, barred.code) == ("fail", 8) and f"{tmp_path / 'file'}: no folder" in barred.message
