"""What an owner sees of the gateways and of the runs that wait."""

import json
from pathlib import Path
from typing import Any

from offsite.coordinator.home import Home


def test_status_shows_who_dispatches_and_what_runs_wait_for(offsite: Any, tmp_path: Path) -> None:
    home = Home(tmp_path / "home", tmp_path / "kit").prepare()
    asked = ("coordinator", "status", "--home", str(home.root))
    empty = offsite(*asked)
    assert empty.returncode == 6 and "not a coordinator's folder" in empty.stderr
    home.use()
    journal = home.journal()
    journal.add_run("r", token="t", owner="alice", spec=b"{}")
    journal.set_run("r", note="waits for site ward")
    for name in ("north", "south"):
        journal.announce(name, address=f"{name}:8443", version="1", started_at=1.0, policy="p", owner="o")
    journal.lead("east")
    alone = offsite(*asked)
    assert (
        alone.returncode == 9 and "no gateway dispatches the runs: they wait; `offsite coordinator up`" in alone.stderr
    )
    journal.lead("south")
    shown = offsite(*asked)
    assert shown.returncode == 0 and shown.stdout.splitlines()[2] == "run r: queued: waits for site ward"
    assert "gateway north at north:8443: stands by" in shown.stdout and "south:8443: dispatches" in shown.stdout
    told = json.loads(offsite(*asked, "--format", "json").stdout)
    assert [one["dispatches"] for one in told["gateways"]] == [False, True]
    assert told["runs"] == [{"id": "r", "state": "queued", "note": "waits for site ward"}]
    journal.close()
