"""Traces by OpenTelemetry: a run, and in it what the coordinator and each site did when, as its report has it."""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import set_span_in_context

from offsite.client.session import Run


class Traces:
    """One trace of a completed run, sent to a collector at URL, such as http://localhost:4318, at its end."""

    def __init__(self, place: str, run: Run) -> None:
        """Take the collector's address."""
        self._run, self._url = run, f"{place.rstrip('/')}/v1/traces"

    def scalar(self, name: str, value: float, *, step: int, at: float) -> None:
        """Leave figures out: they are no spans."""

    def close(self) -> None:
        """Send the spans."""
        if not self._run.report:  # it is not over, or has failed: nothing says what was done when
            return
        status = self._run.status
        provider = TracerProvider(resource=Resource.create({"service.name": "offsite"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=self._url)))
        tracer = provider.get_tracer("offsite")
        about = {"offsite.run": status.id, "offsite.name": status.name, "offsite.state": status.state}
        whole = tracer.start_span("run", start_time=_ns(status.submitted_at), attributes=about)
        inside = set_span_in_context(whole)
        for one in self._run.report.get("spans", ()):
            of = {f"offsite.{name}": one[name] for name in ("who", "step", "round") if name in one}
            span = tracer.start_span(one["kind"], inside, start_time=_ns(one["start"]), attributes=of)
            span.end(_ns(one["end"]))
        whole.end(_ns(status.finished_at))
        provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
