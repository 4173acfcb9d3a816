"""The batch job of a site, run by the shell as Slurm would, with programs in the places of ours and Slurm's."""

import os
import re
import shlex
import signal
import subprocess

import pytest

AGENT = """#!/bin/sh
trap 'echo ended; exit {code}' TERM
echo "$@"
for _ in $(seq 600); do sleep 0.1; done
"""


@pytest.fixture
def job(deploy, tmp_path):
    """Start the job with an agent that ends with a code when it is told to."""

    def start(code=130, agent=AGENT):
        for name, text in {"offsite": agent.format(code=code), "scontrol": '#!/bin/sh\necho "scontrol $@"\n'}.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "OFFSITE_COORDINATOR": "tuning.example.org:8443",
            "SLURM_JOB_ID": "7",
            "SLURM_GPUS_ON_NODE": "2",
        }
        process = subprocess.Popen(
            ["bash", str(deploy / "slurm" / "site.sbatch")], env=environment, stdout=subprocess.PIPE, text=True
        )
        return process, process.stdout.readline()

    return start


def test_out_of_time_the_agent_ends_first_and_the_job_is_queued_again(job) -> None:
    process, _ = job()
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert said.splitlines() == ["ended", "out of time: queued again as job 7", "scontrol requeue 7"]
    assert process.returncode == 0


def test_a_cancelled_job_ends_its_agent_and_is_not_queued_again(job) -> None:
    process, _ = job()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert (said.splitlines(), process.returncode) == (["ended"], 130)


def test_a_job_ends_as_its_agent_does(job) -> None:
    process, _ = job(agent="#!/bin/sh\necho refused; exit 4\n")
    process.communicate(timeout=60)
    assert process.returncode == 4


def test_the_product_takes_the_command_and_slurm_the_signal_and_the_queueing(job, deploy, takes) -> None:
    process, line = job()
    process.terminate()
    process.communicate(timeout=60)
    parameters = takes(shlex.split(line))
    assert (parameters["processes"], parameters["work"].name) == (2, "work")
    options = set(re.findall(r"^#SBATCH --(\S+)", (deploy / "slurm" / "site.sbatch").read_text(), re.MULTILINE))
    assert {"requeue", "signal=B:USR1@60", "dependency=singleton", "open-mode=append"} <= options
