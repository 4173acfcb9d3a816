"""The systemd units: systemd takes them, little is left to them, and the product takes what they run."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = ["offsite-coordinator.service", "offsite-site@bank.service", "offsite-cluster.service"]
EXPOSED = 2.0  # of 10; an unhardened service has 9.6


@pytest.fixture
def machine(deploy, tmp_path):
    """A root folder with the units installed as the README says, and a program to run."""
    shutil.copytree(deploy / "systemd", tmp_path / "etc" / "systemd" / "system")
    program = tmp_path / "opt" / "offsite" / "bin" / "offsite"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_a_unit_and_finds_it_hardened(machine, program, unit) -> None:
    analyze = program("systemd-analyze")
    verify = subprocess.run([analyze, "verify", f"--root={machine}", unit], capture_output=True, text=True)
    assert [line for line in verify.stderr.splitlines() if "sysinit.target not found" not in line] == []
    command = [analyze, "security", "--offline=true", f"--root={machine}", "--no-pager", unit]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", said)[1]) <= EXPOSED


def test_what_units_run_is_what_the_product_takes(deploy, takes) -> None:
    starts = {}
    for path in (deploy / "systemd").glob("*.service"):
        text = path.read_text().replace("\\\n", " ")
        line = re.search(r"^ExecStart=/opt/offsite/bin/offsite (.*)$", text, re.MULTILINE)[1]
        line = line.replace("${OFFSITE_COORDINATOR}", "tuning.example.org:8443").replace("%i", "bank")
        line = line.replace("$OFFSITE_CLUSTER", "--listen 10.0.0.1").replace("$OFFSITE_ARGUMENTS", "")
        starts[path.stem] = takes(shlex.split(line))
        folder = re.search(r"^StateDirectory=(\S+)", text, re.MULTILINE)[1].replace("%i", "bank")
        written = starts[path.stem].get("work") or starts[path.stem]["home"]
        assert Path(written).is_relative_to(f"/var/lib/{folder}")  # the one folder that it may write to
    assert starts.keys() == {unit.removesuffix(".service").replace("bank", "") for unit in UNITS}
