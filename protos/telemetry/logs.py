"""Logs: lines for people, or JSON for programs, one object a line, that say which run, round and site they are about.

    {"at": 1795989518.375, "level": "error", "logger": "offsite...", "site": "ward", "run": "1f...", "round": 2,
     "message": "..."}

No text of a site gets into one: of a fault of ours, where it happened is told, and not what the values were.
"""

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

Form = Literal["text", "json"]
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FRAMES = 12  # of a fault, the innermost

_about: ContextVar[dict[str, Any]] = ContextVar("about", default={})  # noqa: B039 (never changed)


def begin(form: Form, **always: Any) -> None:
    """Log on standard error from now on; in JSON what goes well, too, each line with what it is always about."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(**always) if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("offsite").setLevel(logging.INFO if form == "json" else logging.NOTSET)


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Have what is logged in the body, and in what it awaits, say what it is about."""
    token = _about.set(_about.get() | fields)
    try:
        yield
    finally:
        with suppress(ValueError):  # a stream that is cut off ends in another context
            _about.reset(token)


def subject() -> dict[str, Any]:
    """Return what is logged here is about, for work of it that another process does."""
    return dict(_about.get())


class Lines(logging.Formatter):
    """Writes a record as a JSON object in a line."""

    def __init__(self, **always: Any) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        from offsite.protos.documents import plain  # here, as every command line asks above which forms there are

        line = {"at": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        line |= self._always | _about.get() | getattr(record, "fields", {})
        line["message"] = plain(record.getMessage(), most=10_000)
        if record.exc_info and record.exc_info[0]:
            frames = traceback.extract_tb(record.exc_info[2])[-FRAMES:]
            places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
            line["fault"] = {"kind": record.exc_info[0].__name__, "at": places}
        return json.dumps(line, ensure_ascii=False)
