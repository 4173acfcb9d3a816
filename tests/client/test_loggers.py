"""Figures of a run in TensorBoard's files, in MLflow and in a trace: what was written is read back."""

import gzip
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from offsite.client import OffsiteError
from offsite.client.answers import Event
from offsite.client.loggers import scalars
from offsite.client.session import Run
from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import to_json
from offsite.protos.spec import RunSpec

REPORT = {"spans": [{"who": "bank", "step": "round 1", "kind": "training", "start": 11.0, "end": 12.5}]}
STATUS = pb.RunStatus(
    id="r1",
    name="notes",
    state="completed",
    submitted_at=10.0,
    finished_at=20.0,
    spec=to_json(RunSpec(model="m", rounds=2)),
    report=json.dumps(REPORT),
)
EVENTS = [
    ("site", 1, "bank", {"state": "training", "step": 2, "steps": 5, "loss": 3.5}),
    ("site", 2, "bank", {"state": "training", "step": 2, "steps": 5, "loss": 2.5}),
    ("update", 2, "bank", {"loss": 2.25, "bytes": 1000, "examples": 7}),
    ("figure", 0, "", {"name": "plug_in", "sets": {"exam": {"nll": 0.0, "tokens": 4}}}),
    ("round", 2, "", {"sites": 1, "figures": {"factor_mean_error": 0.5, "none": None}}),
    ("of another version", 2, "", {"loss": 1.0}),
    ("update", 2, "bank", {"of another": "version"}),
]
FIGURES = {
    ("loss/bank", 3.5, 2),
    ("loss/bank", 2.5, 7),
    ("update/bank/loss", 2.25, 2),
    ("update/bank/bytes", 1000, 2),
    ("update/bank/examples", 7, 2),
    ("perplexity/plug_in/overall", 1.0, 0),
    ("perplexity/plug_in/exam", 1.0, 0),
    ("round/sites", 1, 2),
    ("round/factor_mean_error", 0.5, 2),
}


class Session:
    """What a run asks: it is over, and its events are there."""

    def call(self, *_: Any, **__: Any) -> pb.RunStatus:
        return STATUS

    def stream(self, *_: Any) -> Iterator[pb.Events]:
        for at, (kind, number, site, data) in enumerate(EVENTS):
            event = pb.Event(seq=at, at=11.0 + at, kind=kind, round=number, site=site, data=json.dumps(data))
            yield pb.Events(events=[event])


@pytest.fixture
def run() -> Run:
    return Run(Session(), STATUS)  # type: ignore[arg-type]


def test_figures_of_events_have_a_name_a_value_and_a_step() -> None:
    events = [Event(at, 0.0, kind, number, site, data) for at, (kind, number, site, data) in enumerate(EVENTS)]
    assert {one for event in events for one in scalars(event)} == FIGURES


def test_tensorboard_reads_the_scalars_the_spec_and_the_report(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    assert run.log_to(f"tensorboard:{tmp_path}") is run
    (file,) = (tmp_path / "r1").iterdir()
    values = [(event, value) for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    numbers = {(one.tag, one.tensor.float_val[0], event.step) for event, one in values if one.tensor.float_val}
    assert numbers == FIGURES
    texts = {one.tag: one.tensor.string_val[0].decode() for _, one in values if one.tensor.string_val}
    assert '"rounds": 2' in texts["spec/text_summary"] and '"training"' in texts["report/text_summary"]
    assert [event.wall_time for event, one in values if one.tag == "update/bank/loss"] == [13.0]


@pytest.mark.slow  # which its import is
def test_mlflow_has_a_run_with_the_figures_and_who_watches_again_goes_on_in_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    place = f"file:{tmp_path}/store"
    run.log_to(f"mlflow:{place}")
    run.log_to(f"mlflow:{place}")
    client = MlflowClient(place)
    (kept,) = client.search_runs([client.get_experiment_by_name("offsite").experiment_id])
    assert kept.info.run_name == "notes" and kept.info.status == "FINISHED" and kept.info.end_time == 20_000
    assert kept.data.params["rounds"] == "2" and kept.data.params["method.name"] == "lora"
    first, second, *_ = client.get_metric_history(kept.info.run_id, "loss/bank")
    assert (first.value, first.step, first.timestamp, second.value) == (3.5, 2, 11_000, 2.5)
    assert [one.path for one in client.list_artifacts(kept.info.run_id)] == ["report.json"]


def test_a_trace_has_the_spans_of_the_report_in_one_of_the_run(run: Run) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    taken: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=server.serve_forever, daemon=True).start()
    run.log_to(f"otlp:http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    server.server_close()
    request = ExportTraceServiceRequest.FromString(
        gzip.decompress(taken[0]) if taken[0][:2] == b"\x1f\x8b" else taken[0]
    )
    spans = {one.name: one for group in request.resource_spans for scope in group.scope_spans for one in scope.spans}
    whole, training = spans["run"], spans["training"]
    assert training.parent_span_id == whole.span_id and training.trace_id == whole.trace_id
    assert (whole.start_time_unix_nano, training.end_time_unix_nano) == (10_000_000_000, 12_500_000_000)
    about = {one.key: one.value.string_value for one in training.attributes}
    assert about == {"offsite.who": "bank", "offsite.step": "round 1"}


@pytest.mark.parametrize("target", ["tensorbord:x", "tensorboard", "mlflow:"])
def test_another_target_is_refused_with_those_there_are(run: Run, target: str) -> None:
    with pytest.raises(OffsiteError, match="expected tensorboard:DIR, mlflow:URI or otlp:URL"):
        run.log_to(target)


def test_an_extra_that_is_missing_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "offsite.client.loggers.mlflow", None)
    with pytest.raises(OffsiteError, match=r"pip install 'offsite\[mlflow\]'"):
        run.log_to("mlflow:x")
