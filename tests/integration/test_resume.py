"""Either end killed inside a file: what was there stays there, and the rest alone is sent when both are up again."""

import filecmp
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from offsite.coordinator.home import Home
from offsite.coordinator.store.journal import Key
from offsite.protos.chunks import digest_file
from offsite.protos.documents import from_json
from offsite.protos.spec import TaskSpec

from ..bench.tasks import open_task

SITE, RUN, SIZE, SOME = "bank", "large", 128 * 10**6, 8 << 20
COURIER = str(Path(__file__).with_name("courier.py"))


class Courier:
    """A process that does the one task, from wherever an earlier one was."""

    def __init__(self, federation: Any, name: str) -> None:
        self.federation, self.name, self._halts = federation, name, 0
        folder = federation.folder
        files = (folder / "pki" / SITE, folder / f"{RUN}.json", folder / RUN, folder / "work")
        federation.start(name, federation.address, *map(str, files), program=(COURIER,))

    def halted(self, wait: Any) -> int:
        """Wait until it halts once more; return what was there of the file then, in bytes."""
        self._halts += 1
        at = self.expect("halt", count=self._halts)["at"]
        wait(lambda: self._process.status() == psutil.STATUS_STOPPED, f"{self.name} halts")
        return int(at)

    def go_on(self) -> None:
        self._process.resume()

    @property
    def _process(self) -> psutil.Process:
        return self.federation.tree(self.name)[0]

    def expect(self, event: str, *, count: int = 1) -> dict[str, Any]:
        return dict(self.federation.expect(self.name, event, count=count))

    def starts(self, stream: str) -> list[int]:
        """Where its streams began, in bytes of the file."""
        return [event["start"] for event in self.federation.events(self.name, stream)]


def part(folder: Path, pattern: str) -> int:
    """The bytes of the one file that is there in part."""
    (path,) = folder.glob(pattern)
    size = path.stat().st_size
    assert SOME < size < SIZE - SOME, "it is inside the file"
    return size


@pytest.mark.slow
def test_a_transfer_goes_on_where_it_was_after_either_end_was_killed_inside_the_file(
    federation: Any, wait: Any
) -> None:
    folder, kit = federation.folder, federation.folder / "pki" / "coordinator"
    federation.authority.issue("site", SITE)
    home = Home(folder / "home", kit).prepare()
    open_task(home, folder, RUN, site=SITE, size=SIZE)
    blobs, task = home.blobs(), from_json(TaskSpec, (folder / f"{RUN}.json").read_bytes(), where="task")
    federation.coordinate()

    # a download, and the coordinator killed
    courier = Courier(federation, "first")
    assert courier.halted(wait) == part(folder, "work/*.partial")
    federation.kill("coordinator")
    courier.go_on()
    courier.expect("waiting")
    came = part(folder, "work/*.partial")
    federation.coordinate()
    courier.halted(wait)
    assert courier.starts("download") == [0, came]

    # the site's end killed
    came = part(folder, "work/*.partial")
    federation.kill("first")
    courier = Courier(federation, "second")
    assert courier.expect("download")["start"] == came
    assert courier.expect("adapter")["received"] == task.adapter_size - came
    assert filecmp.cmp(folder / "work" / "adapter", blobs.served(task.adapter), shallow=False)

    # an upload, and the coordinator killed
    assert courier.halted(wait) <= part(folder, "home/spool/*")
    federation.kill("coordinator")
    kept = part(folder, "home/spool/*")
    courier.go_on()
    federation.coordinate()
    courier.halted(wait)
    assert courier.starts("upload") == [0, kept]

    # the site's end killed: the coordinator goes on to keep what was on its way
    kept = part(folder, "home/spool/*")
    federation.kill("second")
    courier = Courier(federation, "third")
    assert courier.expect("adapter")["received"] == 0
    assert kept <= courier.expect("upload")["start"] < SIZE - SOME
    courier.expect("receipt")

    journal = home.journal()
    row = journal.task(Key(run=RUN, round=0, site=SITE, attempt=0))
    journal.close()
    assert (row.state, row.update) == ("uploaded", digest_file(folder / RUN))
    assert filecmp.cmp(blobs.served(row.update), folder / RUN, shallow=False)
    assert not list((folder / "home" / "spool").iterdir())
    assert "Traceback" not in federation.log("coordinator").read_text()


@pytest.mark.slow
def test_a_download_goes_on_at_another_gateway_and_an_upload_begins_again_there_and_counts_once(
    federation: Any, wait: Any
) -> None:
    folder = federation.folder
    stores = {"journal": f"sqlite://{folder}/journal.db", "blobs": f"file://{folder}/blobs"}
    federation.authority.issue("site", SITE)
    home = Home(folder / "north", folder / "pki" / "coordinator").prepare()
    home.use(**stores)
    open_task(home, folder, RUN, site=SITE, size=SIZE)
    federation._environment |= {f"OFFSITE_{name.upper()}": url for name, url in stores.items()}
    federation.address = ",".join(federation.coordinate(name=name, home=name) for name in ("north", "south"))

    courier = Courier(federation, "courier")
    courier.halted(wait)
    federation.kill("north")
    came = part(folder, "work/*.partial")
    courier.go_on()
    courier.halted(wait)
    first, second = courier.starts("download")
    assert first == 0 and came <= second < SIZE - SOME, "what came is kept at the site's end"

    federation.coordinate(name="north", home="north")
    courier.go_on()
    while not courier.starts("upload"):
        courier.halted(wait)
        courier.go_on()
    courier.halted(wait)
    assert part(folder, "south/spool/*")
    federation.kill("south")
    courier.go_on()
    courier.halted(wait)
    courier.go_on()
    courier.halted(wait)
    courier.go_on()
    courier.expect("receipt")
    assert courier.starts("upload") == [0, 0], "what came is at the gateway that is gone"

    with closing(home.journal()) as journal:
        row = journal.task(Key(run=RUN, round=0, site=SITE, attempt=0))
        assert (row.state, row.update) == ("uploaded", digest_file(folder / RUN))
        assert [event.kind for event in journal.events(RUN)].count("update") == 1
