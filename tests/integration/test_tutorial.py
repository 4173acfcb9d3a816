"""The tutorial, each line of it as it stands but for the port."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```sh (\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_two_sites_tune_a_model_by_at_most_ten_lines(tmp_path: Path, wait: Any) -> None:
    blocks = dict(BLOCK.findall((DOCS / "tutorial.md").read_text()))
    assert sum(len(lines.splitlines()) for lines in blocks.values()) <= 10
    (tmp_path / "docs").symlink_to(DOCS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def terminal(name: str) -> subprocess.Popen[str]:
        with (tmp_path / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                ["bash", "-ec", blocks[name].replace("8443", str(port))],
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
                start_new_session=True,
                text=True,
            )

    def said(name: str) -> str:
        return (tmp_path / f"{name}.log").read_text()

    started = {}
    try:
        started["owner"] = terminal("owner")
        wait(lambda: "coordinator ready" in said("owner"), "the coordinator is ready")
        started |= {name: terminal(name) for name in ("ward", "lab")}
        assert terminal("researcher").wait(timeout=600) == 0, said("researcher")
    finally:
        for process in started.values():
            os.killpg(process.pid, signal.SIGINT)
        ends = {name: process.wait(timeout=60) for name, process in started.items()}
    assert ends == {"owner": 0, "ward": 130, "lab": 130}, {name: said(name) for name in ends}
    assert (tmp_path / "outcome" / "adapter" / "adapter_model.safetensors").stat().st_size > 100_000
    assert "| plug-in |" in (tmp_path / "outcome" / "README.md").read_text()
    assert "warning" not in said("researcher") and "Traceback" not in "".join(map(said, (*ends, "researcher")))
