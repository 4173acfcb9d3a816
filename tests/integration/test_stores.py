"""A run whose journal and files are not in the coordinator's home, over real processes."""

import shutil
from pathlib import Path
from typing import Any

import pytest


def published(run: Any, folder: Path) -> bytes:
    return (Path(run.result(folder)) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow(alone=True)
def test_a_run_from_postgresql_and_s3_gives_the_same_bytes_and_goes_on_with_nothing_near(
    coordinated: Any, federations: Any, s3: Any, postgresql: Any, tmp_path: Path
) -> None:
    coordinated.have("hospital")
    with coordinated.connect() as session:
        wanted = published(session.submit(coordinated.spec(rounds=2, sites=("hospital",))), tmp_path / "whole")

    journal, blobs = postgresql.empty(), s3.url()
    with federations(tmp_path, OFFSITE_JOURNAL=journal, OFFSITE_BLOBS=blobs) as far:
        far.coordinate()
        far.join("hospital")
        with far.connect() as session:
            run = session.submit(far.spec()).wait().id
        far.kill("coordinator")
        shutil.rmtree(far.folder / "home")  # a new machine
        far.coordinate()
        with far.connect() as session:
            first = session.run(run)
            assert published(first, tmp_path / "first") != wanted
            second = session.submit(far.spec(), start=first)
            assert published(second, tmp_path / "second") == wanted
            assert all(s3.object(blobs, file.digest).is_file() for file in second.status.artifacts)
        home = far.folder / "home"
        assert not (home / "blobs").exists() and not (home / "journal.db").exists()
        assert "confidential" not in far.log("coordinator").read_text()
