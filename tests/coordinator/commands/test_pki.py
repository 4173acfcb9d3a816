import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offsite.coordinator.commands.pki import app
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.security import tokens
from offsite.protos.security.identity import Identity


def run(*arguments: str | Path) -> str:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).output


def test_a_fleet_is_set_up_and_a_site_leaves_it(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    assert "back it up" in run("init", folder, "--name", "acme")
    assert str(folder / "hub") in run("issue", folder, "hub", "--role", "coordinator", "--host", "tune.acme.org")
    assert "tls.key" in run("issue", folder, "--role", "site", "berlin", "--days", "30")
    assert Identity.load(folder / "berlin", expect="site").warning is None
    assert str(folder / "crl.pem") in run("revoke", folder, "berlin")
    assert "it holds for 7 days" in run("refresh", folder, "--days", "7")
    listed = json.loads(run("list", folder, "--format", "json"))
    assert [(entry["name"], entry["role"], entry["status"]) for entry in listed] == [
        ("hub", "coordinator", "valid"),
        ("berlin", "site", "revoked"),
    ]
    table = [line.split()[:4] for line in run("list", folder).splitlines()[1:]]
    assert table == [["hub", "coordinator", "certificate", "valid"], ["berlin", "site", "certificate", "revoked"]]


def test_a_coordinator_without_hosts_is_said_to_be_local(tmp_path: Path) -> None:
    run("init", tmp_path)
    assert "same machine only" in run("issue", tmp_path, "hub", "--role", "coordinator")


def test_a_token_is_printed_by_itself_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    run("init", folder)
    made = CliRunner().invoke(
        app, ["token", str(folder), "berlin", "--role", "site", "--address", "a.org:8443,b.org:8443", "--hours", "2"]
    )
    assert made.exit_code == 0
    token = tokens.read(made.stdout)
    assert (token.role, token.name, token.address) == ("site", "berlin", "a.org:8443,b.org:8443")
    assert made.stdout == f"{token}\n", "it can be redirected into a file"
    assert "offsite site enrol - --identity berlin" in made.stderr and tokens.PREFIX not in made.stderr
    run("token", folder, "berlin", "--role", "researcher", "--address", "a.org:8443")
    table = [line.split()[:4] for line in run("list", folder).splitlines()[1:]]
    assert table == [["berlin", "site", "token", "revoked"], ["berlin", "researcher", "token", "open"]]
    listed = json.loads(run("list", folder, "--format", "json"))
    assert [(entry["kind"], entry["status"]) for entry in listed] == [("token", "revoked"), ("token", "open")]
    assert "Revoked what 'berlin' has" in run("revoke", folder, "berlin")


def test_tokens_for_many_are_made_at_once_or_not_at_all(tmp_path: Path) -> None:
    folder, names = tmp_path / "pki", tmp_path / "names"
    run("init", folder)
    names.write_text("paris\n\n  oslo \n")
    token = ("token", folder, "berlin", "--role", "site", "--address", "a.org:8443", "--names", names)
    with pytest.raises(InputError, match="3 tokens are to be made; name a folder for them with --to"):
        run(*token)
    assert "Hand each of 3 files" in run(*token, "--to", tmp_path / "tokens")
    for name in ("berlin", "paris", "oslo"):
        file = tmp_path / "tokens" / f"{name}.token"
        assert tokens.read(file.read_text()).name == name and file.stat().st_mode & 0o077 == 0
    names.write_text("rome\nBerlin\n")
    with pytest.raises(InputError, match="'berlin' is named twice"):
        run(*token, "--to", tmp_path / "tokens")
    run("issue", folder, "athens", "--role", "site")
    names.write_text("rome\nathens\n")
    with pytest.raises(ConflictError, match="'athens' has a certificate"):
        run(*token, "--to", tmp_path / "tokens")
    listed = json.loads(run("list", folder, "--format", "json"))
    assert [(one["name"], one["status"]) for one in listed if one["kind"] == "token"] == [
        ("berlin", "open"),
        ("paris", "open"),
        ("oslo", "open"),
    ]
    with pytest.raises(InputError, match="nobody is named"):
        run("token", folder, "--role", "site", "--address", "a.org:8443")


def test_a_coordinators_kit_is_renewed(tmp_path: Path) -> None:
    run("init", tmp_path)
    run("issue", tmp_path, "hub", "--role", "coordinator", "--days", "20")
    before = Identity.load(tmp_path / "hub")
    assert before.warning is None or "hub" in before.warning
    assert "without a restart" in run("renew", tmp_path, "hub")
    assert Identity.load(tmp_path / "hub").expires > before.expires


def test_a_fault_is_raised_for_the_program_to_print(tmp_path: Path) -> None:
    run("init", tmp_path)
    with pytest.raises(ConflictError):
        run("init", tmp_path)


def test_an_unknown_role_is_a_usage_error(tmp_path: Path) -> None:
    run("init", tmp_path)
    assert CliRunner().invoke(app, ["issue", str(tmp_path), "x", "--role", "boss"]).exit_code == 2
