"""The command line: every group answers, every mistake is one sentence and its exit code."""

import inspect
import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import typer

from offsite.client import session
from offsite.client.cli import GROUP, GROUPS, at_home
from offsite.coordinator.commands import emulator, transfer
from offsite.protos.recipes import render
from offsite.protos.security.pki import Authority
from offsite.protos.spec import BUILDERS, METHOD, TRAINABLE


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offsite.client", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"})


@pytest.mark.parametrize("group", ["", "coordinator", "demo", "emulator", "pki", "run", "site"])
def test_every_group_explains_itself(offsite: Any, group: str) -> None:
    told = offsite(*([group] if group else []), "--help")
    assert told.returncode == 0 and "Usage: offsite" in told.stdout, told.stderr
    if not group:
        assert all(name in told.stdout for name in ("coordinator", "demo", "emulator", "pki", "run", "site"))
        assert "130 interrupted" in told.stdout
        assert told.stdout == process("--help").stdout


# Asks for the help of all, then of each group, and says what was loaded for it.
LOADED = """
import contextlib, io, json, sys
from importlib.metadata import entry_points
from offsite.client import cli

def loaded(*arguments):
    sys.argv = ["offsite", *arguments, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        cli.main()
    return told.getvalue(), sorted(sys.modules)

groups = [entry.name for entry in entry_points(group=cli.GROUP)]
print(json.dumps([loaded(), *map(loaded, sorted(groups))]))
"""
HEAVY = {"cryptography", "google", "grpc", "jinja2", "numpy", "ray", "sqlalchemy", "torch", "transformers"}
OURS = {
    f"offsite.{name}" for name in ("client.session", "coordinator.store", "emulator", "kernels", "protos.documents")
}


def test_help_loads_no_group_but_another_packages_and_of_a_group_nothing_that_works(tmp_path: Path) -> None:
    guest = "import typer\napp = typer.Typer()\n@app.command()\ndef stay(): 'Be a guest.'\n"
    (tmp_path / "guest.py").write_text(guest)
    about = tmp_path / "guest-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\nguest = guest:app\n")
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    told = subprocess.run(
        [sys.executable, "-c", LOADED],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": search},
    )
    (all_of_it, first), *others = json.loads(told.stdout)
    assert "Be a guest." in all_of_it and "guest" in first
    assert "pydantic" not in first and not [name for name in first if ".commands" in name]
    assert all("Usage: offsite" in text for text, _ in others) and "offsite.coordinator.commands.pki" in others[-1][1]
    assert not (HEAVY | OURS) & {*others[-1][1]}


def test_the_line_of_a_group_is_its_own() -> None:
    for entry in entry_points(group=GROUP):
        if entry.name in GROUPS:
            own = typer.main.get_command(entry.load()).get_short_help_str(limit=1000)
            assert GROUPS[entry.name][1] == own, entry.name


def test_a_default_that_is_written_out_is_the_specs() -> None:
    defaults = {name: one.default for name, one in inspect.signature(emulator.build).parameters.items()}
    assert defaults["builder"] == render(BUILDERS) and defaults["trainable"] == render([TRAINABLE])
    assert inspect.signature(transfer.transfer).parameters["method"].default == render([METHOD])


def refused(told: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    """One sentence on stderr, no traceback, the documented exit code."""
    assert (told.returncode, told.stderr.count("\n")) == (code, 1), told.stderr
    assert told.stderr.startswith("offsite: ") and words in told.stderr


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    authority = Authority.create(tmp_path / "pki")
    for role, name in (("site", "bank"), ("researcher", "alice")):
        authority.issue(role, name)  # type: ignore[arg-type]
    (tmp_path / "policy.toml").write_text(f'bases = ["any"]\ndata = ["{tmp_path}"]\nodd_rows = "refuse"\n')
    (tmp_path / "good.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "columns.jsonl").write_text('{"question": "one", "reply": "two"}\n')
    return tmp_path


def join(kits: Path, *, kit: str = "bank", data: str = "good.jsonl", policy: str = "policy.toml") -> list[str]:
    return [
        *("site", "join", "127.0.0.1:1", "--identity", str(kits / "pki" / kit), "--policy", str(kits / policy)),
        *("--data", str(kits / data), "--work", str(kits / "work")),
    ]


def test_data_that_cannot_be_read_is_named_with_its_line(kits: Path, offsite: Any) -> None:
    refused(process(*join(kits, data="broken.jsonl")), 3, "broken.jsonl, line 2: not JSON")
    refused(offsite(*join(kits, data="broken.jsonl")), 3, "broken.jsonl, line 2: not JSON")
    refused(offsite(*join(kits, data="columns.jsonl")), 3, "columns.jsonl, line 1")
    refused(offsite(*join(kits, data="none.jsonl")), 3, "none.jsonl: no such file")


def test_data_outside_the_policy_is_refused(kits: Path, offsite: Any) -> None:
    (kits / "narrow.toml").write_text(f'bases = ["any"]\ndata = ["{kits / "pki"}"]\n')
    refused(offsite(*join(kits, policy="narrow.toml")), 5, "the policy allows data only in")


def test_a_policy_with_a_mistake_is_named_by_field(kits: Path, offsite: Any) -> None:
    (kits / "odd.toml").write_text('bases = ["any"]\ndata = []\nmax_step = 5\n')
    refused(
        offsite(*join(kits, policy="odd.toml")),
        3,
        "odd.toml: max_step: there is no such field; did you mean max_steps?",
    )


def test_a_kit_of_another_role_or_none_is_refused(kits: Path, offsite: Any) -> None:
    refused(offsite(*join(kits, kit="alice")), 4, "alice")
    refused(offsite(*join(kits, kit="nobody")), 4, "nobody")


def test_a_coordinator_that_is_not_there_has_its_exit_code(
    kits: Path, offsite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for proxy in ("https_proxy", "grpc_proxy"):  # which must not stand between this machine and itself
        monkeypatch.setenv(proxy, "http://192.0.2.1:3128")
    monkeypatch.setattr(session, "connect", partial(session.connect, patience_s=0.5))
    kit = ["--identity", str(kits / "pki" / "alice")]
    refused(offsite("run", "list", "--coordinator", "127.0.0.1:1", *kit), 9, "nothing listens there")
    refused(offsite("run", "list", "--coordinator", "https://x.org", *kit), 3, "HOST:PORT, here x.org:8443")


def test_a_run_file_with_a_mistake_is_named_by_field(kits: Path, offsite: Any) -> None:
    (kits / "run.toml").write_text('model = "m"\nround = 3\n')
    where = ["--coordinator", "127.0.0.1:1", "--identity", str(kits / "pki" / "alice")]
    refused(
        offsite("run", "submit", str(kits / "run.toml"), *where),
        3,
        "run.toml: round: there is no such field; did you mean rounds?",
    )
    refused(offsite("run", "submit", "--set", "rounds", *where), 3, "--set rounds: expected NAME=VALUE")


def test_the_version_is_said(offsite: Any) -> None:
    told = offsite("--version")
    assert (told.returncode, told.stdout) == (0, f"offsite {version('offsite')}\n")


def test_a_tilde_is_ones_home_where_a_shell_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/a", "--data=~/b", "--set", "public=~/c", "a~b", "--name=x~", "~"]
    assert [at_home(one) for one in given] == [
        *("/home/me/a", "--data=/home/me/b", "--set", "public=~/c", "a~b", "--name=x~", "/home/me"),
    ]


def test_an_unknown_option_is_a_usage_error() -> None:
    told = process("run", "list", "--nonsense")
    assert told.returncode == 2 and "Traceback" not in told.stderr


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path, offsite: Any) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    refused(offsite("demo", "--out", str(tmp_path)), 11, "not empty, and not made by a demo")
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"
    refused(offsite("demo", "--out", str(tmp_path / "x"), "--site", "bank"), 3, "expected NAME=FILE")


def test_a_path_that_looks_like_markup_is_only_a_path(tmp_path: Path, offsite: Any) -> None:
    told = offsite("demo", "--out", str(tmp_path / "x"), "--model", "/none/[/x]")
    refused(told, 3, "/none/[/x]")
    assert "model /none/[/x]" in told.stdout
