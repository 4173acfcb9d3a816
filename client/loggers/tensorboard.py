"""TensorBoard's event files: a folder for each run."""

import json
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from offsite.client.session import Run
from offsite.protos.documents import to_plain


class Files:
    """The event files of a run in a folder, DIR/RUN; its spec and report are texts."""

    def __init__(self, place: str, run: Run) -> None:
        """Begin a file in the folder."""
        self._run, self._writer = run, EventFileWriter(str(Path(place).expanduser() / run.id))
        self._text("spec", json.dumps(to_plain(run.spec), indent=2))

    def scalar(self, name: str, value: float, *, step: int, at: float) -> None:
        """Write a scalar."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._writer.add_event(Record(wall_time=at, step=step, summary=summary))

    def close(self) -> None:
        """Write the report, where there is one."""
        if self._run.report:
            self._text("report", json.dumps(self._run.report, indent=2))
        self._writer.close()

    def _text(self, name: str, text: str) -> None:
        """Write a text, which the page shows as Markdown."""
        tensor = TensorProto(dtype=DT_STRING, string_val=[f"```json\n{text}\n```".encode()])
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)
        self._writer.add_event(Record(wall_time=self._run.status.submitted_at, summary=Summary(value=[value])))
