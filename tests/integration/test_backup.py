"""The machine is lost in the middle of a round; what was backed up goes on elsewhere, to the same bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

NEAR, FAR = "near", "far"
PAIRS = [(NEAR, FAR), (FAR, NEAR)]  # `tests/coordinator/backup` has all of them


def published(run: Any, folder: Path) -> bytes:
    return (Path(run.result(folder)) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_run_that_is_restored_elsewhere_gives_the_bytes_of_one_that_was_left_alone(
    source: str, target: str, coordinated: Any, federations: Any, tmp_path: Path, wait: Any, request: Any, offsite: Any
) -> None:
    def stores(kind: str) -> dict[str, str]:
        if kind == NEAR:
            return {}
        journal, blobs = request.getfixturevalue("postgresql").empty(), request.getfixturevalue("s3").url()
        return {"OFFSITE_JOURNAL": journal, "OFFSITE_BLOBS": blobs}

    here, elsewhere = stores(source), stores(target)
    coordinated.have("hospital")
    spec = {"rounds": 2, "sites": ("hospital",)}
    with coordinated.connect() as session:
        wanted = published(session.submit(coordinated.spec(**spec)), tmp_path / "whole")

    with federations(tmp_path, **here) as first:
        first.coordinate()
        first.join("hospital")
        with first.connect() as session:
            run = session.submit(first.spec(**spec)).id
        wait(lambda: [step for step in first.events("hospital", "step") if step["round"] == 2], "the second round")
        for process in first.tree("hospital"):
            process.suspend()
        kit = ("--identity", str(first.folder / "pki" / "coordinator"))
        command = ("coordinator", "backup", str(tmp_path / "backup"), *kit, "--home", str(first.folder / "home"))
        said = offsite(*command, "--format", "json")
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["live"] == 1 and json.loads(said.stdout)["lost"] == []
        first.kill("coordinator")
        for process in first.tree("hospital"):
            process.resume()
        shutil.rmtree(first.folder / "home")  # and nobody goes on in the old stores

        urls = [word for name, url in elsewhere.items() for word in (f"--{name.partition('_')[2].lower()}", url)]
        command = ("coordinator", "restore", str(tmp_path / "backup"), *kit, "--home", str(first.folder / "other"))
        said = offsite(*command, *urls)
        assert said.returncode == 0, said.stderr
        for name in here:
            del first._environment[name]
        first.coordinate(home="other")
        with first.connect() as session:
            again = session.run(run)
            warned = [event.data["message"] for event in list(again.watch()) if event.kind == "warning"]
            assert published(again, tmp_path / "restored") == wanted
        assert warned and "restored from a backup" in warned[0]
