"""A run whose journal is in PostgreSQL, over real processes."""

from typing import Any

import pytest


def digests(run: Any) -> dict[str, str]:
    return {artifact.name: artifact.digest for artifact in run.status.artifacts}


@pytest.mark.slow
def test_a_run_ends_with_the_bytes_of_one_in_a_file_though_the_coordinator_and_the_database_are_killed(
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

    url = postgresql.empty()
    federation._environment["OFFSITE_JOURNAL"] = url
    federation.coordinate(home="other")
    federation.join("hospital")
    del federation._environment["OFFSITE_JOURNAL"]  # the home has it from now on
    with federation.connect() as session:
        run = session.submit(spec)
        wait(lambda: [task for task in federation.events("hospital", "task") if task["run"] == run.id], "the task")
        federation.kill("coordinator")
        postgresql.kill()
        postgresql.start()
        federation.coordinate(home="other")
        wait(lambda: len(federation.events("hospital", "uploaded")) > 2, "an upload")
        postgresql.kill()  # under a coordinator that goes on
        postgresql.start()
        assert digests(run.wait()) == undisturbed
        up = ("coordinator", "up", "--executor", "threads", "--listen", "127.0.0.1:0", "--journal", url)
        kit = str(federation.folder / "pki" / "coordinator")
        federation.start("second", *up, "--identity", kit, "--home", str(federation.folder / "second"))
        assert federation.ended("second") == 11
        assert "works on this journal with other blobs; name the same" in federation.log("second").read_text()
    assert not (federation.folder / "other" / "journal.db").exists()
