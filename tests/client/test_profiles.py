"""Profiles: what an option says goes before the environment, and that before the profile in use."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from offsite.client import profiles, session
from offsite.protos.errors import InputError


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of profiles, which is not there yet, and an environment that says nothing."""
    for name in ("PROFILE", "COORDINATOR", "IDENTITY"):
        monkeypatch.setenv(f"OFFSITE_{name}", "")
    monkeypatch.setenv("OFFSITE_CONFIG", str(tmp_path / "own" / "config.toml"))
    return tmp_path / "own" / "config.toml"


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """With whom commands speak, and as whom; none gets further."""
    made: list[tuple[str, str]] = []

    def connect(coordinator: str, *, identity: Path, **_: Any) -> None:
        made.append((coordinator, str(identity)))
        raise InputError("so far and no further")

    monkeypatch.setattr(session, "connect", connect)
    return made


def keep(offsite: Any, name: str, *more: str) -> None:
    told = offsite("identity", "profile", "add", name, *more)
    assert told.returncode == 0, told.stderr


def test_an_option_goes_before_the_environment_and_that_before_the_profile_in_use(
    offsite: Any, reached: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(offsite, "work", "--coordinator", "work:1", "--identity", str(tmp_path))
    keep(offsite, "home", "--coordinator", "home:2", "--identity", "/")
    listed = ("run", "list")
    offsite(*listed)
    offsite("--profile", "home", *listed)
    monkeypatch.setenv("OFFSITE_PROFILE", "home")
    offsite(*listed)
    offsite("--profile", "work", *listed)
    monkeypatch.setenv("OFFSITE_PROFILE", "home")
    monkeypatch.setenv("OFFSITE_COORDINATOR", "there:3")
    offsite(*listed)
    offsite(*listed, "--coordinator", "here:4", "--identity", "kit")
    work, home = ("work:1", str(tmp_path)), ("home:2", "/")
    assert reached == [work, home, home, work, ("there:3", "/"), ("here:4", "kit")]


def test_profiles_are_listed_used_written_anew_and_removed(offsite: Any, file: Path) -> None:
    assert "no profiles yet" in offsite("identity", "profile", "list").stdout
    keep(offsite, "a.b", "--coordinator", "one:1")
    keep(offsite, "second", "--coordinator", "two:2")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    offsite("identity", "profile", "use", "second")
    keep(offsite, "second", "--coordinator", "three:3")
    listed = json.loads(offsite("identity", "profile", "list", "--format", "json").stdout)
    assert [(one["name"], one["coordinator"], one["default"]) for one in listed] == [
        ("a.b", "one:1", False),
        ("second", "three:3", True),
    ]
    assert "* second  three:3  -" in offsite("identity", "profile", "list").stdout
    offsite("identity", "profile", "remove", "second")
    assert profiles.load().default is None and [*profiles.load().profile] == ["a.b"]


def test_what_is_no_profile_is_named_with_what_to_do(
    offsite: Any, reached: list[tuple[str, str]], file: Path, tmp_path: Path
) -> None:
    def refused(code: int, words: str, *arguments: str) -> None:
        told = offsite(*arguments)
        assert (told.returncode, told.stderr.count("\n")) == (code, 1) and words in told.stderr, told.stderr

    missing = offsite("run", "list")
    assert (
        missing.returncode == 2 and "Missing option '--coordinator': give it, set OFFSITE_COORDINATOR" in missing.stderr
    )
    refused(6, "no profile 'work'; `offsite identity profile add` makes one", "identity", "profile", "use", "work")
    keep(offsite, "work", "--coordinator", "one:1")
    missing = offsite("run", "list")
    assert missing.returncode == 2 and "Missing option '--identity'" in missing.stderr
    refused(6, "no profile 'wrok'; did you mean work?", "--profile", "wrok", "run", "list")
    os.environ["OFFSITE_PROFILE"] = ""
    refused(3, "nothing: no such folder", "identity", "profile", "add", "x", "--identity", str(tmp_path / "nothing"))
    refused(3, "HOST:PORT", "identity", "profile", "add", "x", "--coordinator", "https://x.org")
    refused(3, "profile", "identity", "profile", "add", "a b", "--coordinator", "one:1")
    file.write_text("[profile.work]\ncoordinater = 'one:1'\n")
    refused(3, "coordinater: there is no such field; did you mean coordinator?", "run", "list")
    assert reached == []


@pytest.mark.parametrize("text", ['a"b\\c', "tab", "häuser/𝛼", "'[x]'=#"])
def test_what_is_kept_is_what_was_given(text: str) -> None:
    made = profiles.Profiles(default="x", profile={"x": profiles.Profile(coordinator=text, identity=text)})
    made.save()
    assert profiles.load() == made


def test_the_file_is_where_the_systems_settings_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFSITE_CONFIG", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert profiles.file() == tmp_path / "offsite" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profiles.file() == tmp_path / ".config" / "offsite" / "config.toml"


def test_a_shell_completes_groups_and_commands(offsite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "complete -o default -F _offsite_completion offsite" in offsite("--show-completion", "bash").stdout
    monkeypatch.setenv("_OFFSITE_COMPLETE", "complete_bash")
    for words, wanted in {
        "offsite ru": ["run"],
        "offsite run l": ["ls", "log"],
        "offsite run ls --li": ["--limit"],
    }.items():
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        assert offsite().stdout.split() == wanted
