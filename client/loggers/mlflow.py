"""MLflow's tracking: a run of its own, of the same name, in the experiment "offsite"."""

from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from offsite.client.session import Run
from offsite.protos.documents import to_plain

EXPERIMENT, TAG = "offsite", "offsite.run"
ENDS = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
BATCH = 500  # metrics in a call


class Tracking:
    """A run at a tracking URI; who watches one again goes on in it."""

    def __init__(self, place: str, run: Run) -> None:
        """Find the run's, or make it, with the fields of its spec as parameters."""
        self._run, self._client, self._metrics = run, MlflowClient(place), list[Metric]()
        known = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        there = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if there:
            self._id = there[0].info.run_id
            return
        at, tags = int(run.status.submitted_at * 1000), {TAG: run.id}
        name = run.status.name or run.id
        self._id = self._client.create_run(experiment, start_time=at, tags=tags, run_name=name).info.run_id
        params = [Param(name, text) for name, text in _flat(to_plain(run.spec)) if text]
        self._client.log_batch(self._id, params=params)

    def scalar(self, name: str, value: float, *, step: int, at: float) -> None:
        """Take a metric, and write many at once."""
        self._metrics.append(Metric(name, value, int(at * 1000), step))
        if len(self._metrics) >= BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is left, and how the run ended."""
        self._flush()
        if self._run.report:
            self._client.log_dict(self._id, self._run.report, "report.json")
        if self._run.state in ENDS:
            self._client.set_terminated(self._id, ENDS[self._run.state], int(self._run.status.finished_at * 1000))

    def _flush(self) -> None:
        self._client.log_batch(self._id, metrics=self._metrics)
        self._metrics = []


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Return the fields of plain data by dotted names; of lists as they are written."""
    if not isinstance(value, dict):
        return [(name, "" if value is None else str(value)[:6000])]
    return [pair for key, one in value.items() for pair in _flat(one, f"{name}.{key}".lstrip("."))]
