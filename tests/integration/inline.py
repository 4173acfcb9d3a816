"""A run with all its parts in one process: real steps, and sites that train between two looks of the supervisor."""

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

from offsite.client.site.engines.base import EngineSpec
from offsite.client.site.job import TrainerJob
from offsite.client.site.policy import Policy
from offsite.client.site.training import train
from offsite.coordinator.home import Home
from offsite.coordinator.runs.steps import performing
from offsite.coordinator.runs.supervisor import Supervisor
from offsite.coordinator.service.uploads import Upload
from offsite.coordinator.store.journal import OPEN, Row
from offsite.protos import fleet_pb2 as pb
from offsite.protos.chunks import digest_file
from offsite.protos.documents import from_json
from offsite.protos.spec import Manifest, TaskSpec


class Site:
    """Trains in this process; a task that comes again, after a kill, has been trained and its update is sent again."""

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder, self._data = folder, data
        folder.mkdir()
        (folder / "secret").write_bytes(bytes(32))

    def work(self, home: Home, row: Row) -> None:
        """Do an open task."""
        journal, out = home.journal(), self._folder / f"{row.run}-{row.round}"
        if not out.exists():
            self._train(home, from_json(TaskSpec, row.spec, where="task"), out)
        file, key = out / "update.safetensors", pb.TaskKey(run=row.run, round=row.round, attempt=row.attempt)
        about = {"digest": digest_file(file), "size": file.stat().st_size}
        header = pb.UploadHeader(key=key, metrics=(out / "metrics.json").read_text(), **about)
        upload = Upload(home, journal, home.blobs(), row.site, header)
        kept = upload.begin()
        with closing(upload):
            upload.write(kept, file.read_bytes()[kept:])
        upload.finish()

    def _train(self, home: Home, task: TaskSpec, out: Path) -> None:
        bundle = self._folder / "bundle"
        listed = from_json(Manifest, home.blobs().path(task.manifest).read_bytes(), where="manifest")
        for entry in listed.files:
            (bundle / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (bundle / entry.path).write_bytes(home.blobs().path(entry.digest).read_bytes())
        job = TrainerJob(
            **{"bundle": str(bundle), "manifest": listed, "adapter": str(home.blobs().path(task.adapter))},
            **{"data": str(self._data), "task": task, "engine": EngineSpec(name="plain", device="cpu")},
            **{
                "policy": Policy(bases=("any",), data=("/",), suspicious="warn", max_passes=100.0, min_rows=4),
                "out": str(out),
            },
            secret=str(self._folder / "secret"),
        )
        train(job, say=lambda event, **fields: None, rendezvous=self._folder / "rendezvous")


def live(home: Home, sites: Mapping[str, Site], perform: Callable[..., bytes] | None = None, *, run: str = "r") -> None:
    """Take a run to its end, with sites that are here."""
    do = perform or partial(performing.perform, home.node)

    def work(_: float) -> None:
        for row in home.journal().tasks(run):
            if row.state in OPEN:
                sites[row.site].work(home, row)

    Supervisor(home, run, perform=lambda *job: do(*job[:3]), rest=work).run()
