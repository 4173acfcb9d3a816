"""The images themselves: a federation of containers does a run."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_sites_in_containers_finish_a_run(deploy, tmp_path) -> None:
    if not os.environ.get("COMPOSE"):
        pytest.skip("COMPOSE is not set: build the images with deploy/docker/build.sh, then set it as try.sh says")
    environment = os.environ | {"OUT": str(tmp_path / "out")}
    tried = subprocess.run([deploy / "compose" / "try.sh"], env=environment, capture_output=True, text=True)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert (tmp_path / "out" / "outcome" / "adapter" / "adapter_model.safetensors").stat().st_size


@pytest.mark.slow
def test_two_sites_in_the_charts_pods_finish_a_run(deploy, tmp_path) -> None:
    if not os.environ.get("HELM"):
        pytest.skip("HELM is not set: build the images with podman, then set it to Helm's program")
    command = [sys.executable, deploy / "helm" / "try.py", "--helm", os.environ["HELM"], tmp_path / "out"]
    tried = subprocess.run(command, capture_output=True, text=True)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert (tmp_path / "out" / "outcome" / "adapter" / "adapter_model.safetensors").stat().st_size
