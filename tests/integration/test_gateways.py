"""Several gateways to the same runs, over real processes: sites and people at any, one dispatches, and any may die."""

from pathlib import Path
from typing import Any

import pytest

from offsite.client import connect


def published(run: Any, folder: Path) -> bytes:
    return (Path(run.result(folder)) / "adapter" / "adapter_model.safetensors").read_bytes()


pytestmark = pytest.mark.slow


@pytest.fixture(params=["sqlite and folder", "postgresql and s3"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The URLs of stores that gateways share, as their environment."""
    if request.param == "sqlite and folder":
        journal, blobs = f"sqlite://{tmp_path}/journal.db", f"file://{tmp_path}/blobs"
    else:
        journal, blobs = request.getfixturevalue("postgresql").empty(), request.getfixturevalue("s3").url()
    return {"OFFSITE_JOURNAL": journal, "OFFSITE_BLOBS": blobs}


def test_a_run_ends_with_the_bytes_of_one_gateway_though_the_one_that_dispatches_is_killed_in_a_round(
    coordinated: Any, federations: Any, stores: dict[str, str], tmp_path: Path, wait: Any
) -> None:
    sites = ("bank", "hospital")
    coordinated.have(*sites)
    with coordinated.connect() as session:
        wanted = published(session.submit(coordinated.spec(rounds=2, sites=sites)), tmp_path / "one")

    with federations(tmp_path, **stores) as federation:
        gateways = [federation.coordinate(name=name, home=name) for name in ("north", "south")]
        assert [federation.events(name, "ready")[0]["dispatches"] for name in ("north", "south")] == [True, False]
        for site, order in (("bank", gateways), ("hospital", gateways[::-1])):
            federation.address = ",".join(order)
            federation.join(site)
        with connect(gateways[1], identity=federation.owner, patience_s=60) as session:
            run = session.submit(federation.spec(rounds=2, sites=sites))
            watched = run.watch()
            while next(watched).kind != "update":
                continue
            federation.kill("north")
            federation.expect("south", "dispatches")
            assert [event.kind for event in watched].count("update") == 3, "each is counted once"
            assert published(run, tmp_path / "two") == wanted
        assert {federation.events(site, "enrolled")[0]["coordinator"] for site in sites} == set(gateways)
        assert "Traceback" not in federation.log("south").read_text()
