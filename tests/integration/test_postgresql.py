"""A run whose journal is in PostgreSQL, over real processes."""

from typing import Any

import pytest


def digests(run: Any) -> dict[str, str]:
    return {artifact.name: artifact.digest for artifact in run.status.artifacts}


@pytest.mark.slow
def test_a_run_ends_with_the_bytes_of_one_in_a_file_though_a_gateway_and_the_database_are_killed(
    federation: Any, wait: Any, postgresql: Any
) -> None:
    spec = federation.spec(rounds=2)
    federation.coordinate()
    federation.join("hospital")
    with federation.connect() as session:
        undisturbed = digests(session.submit(spec).wait())
    assert undisturbed
    for name in ("hospital", "coordinator"):
        federation.kill(name)

    journal, blobs = postgresql.empty(), f"file://{federation.folder}/blobs"
    federation._environment |= {"OFFSITE_JOURNAL": journal, "OFFSITE_BLOBS": blobs}
    gateways = [federation.coordinate(name=name, home=name) for name in ("north", "south")]
    federation.address = ",".join(gateways)
    federation.join("hospital")
    with federation.connect() as session:
        run = session.submit(spec)
        wait(lambda: [task for task in federation.events("hospital", "task") if task["run"] == run.id], "the task")
        federation.kill("north")
        postgresql.kill()
        postgresql.start()
        federation.expect("south", "dispatches")
        wait(lambda: len(federation.events("hospital", "uploaded")) > 2, "an upload")
        postgresql.kill()
        postgresql.start()
        assert digests(run.wait()) == undisturbed
        del federation._environment["OFFSITE_BLOBS"], federation._environment["OFFSITE_JOURNAL"]
        up = ("coordinator", "up", "--executor", "threads", "--listen", "127.0.0.1:0", "--journal", journal)
        kit = str(federation.folder / "pki" / "coordinator")
        federation.start("west", *up, "--identity", kit, "--home", str(federation.folder / "west"))
        assert federation.ended("west") == 11
        assert "works on this journal with other blobs; name the same" in federation.log("west").read_text()
    assert not (federation.folder / "south" / "journal.db").exists()
