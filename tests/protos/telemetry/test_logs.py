"""A line of a log is one JSON object that says what it is about, and holds no value that a fault had."""

import asyncio
import json
import logging

import pytest

from offsite.protos.telemetry.logs import Lines, about, begin


@pytest.mark.usefixtures("logging_untouched")
def test_a_line_says_what_it_is_about_wherever_it_is_awaited(capsys: pytest.CaptureFixture[str]) -> None:
    begin("json", site="ward")
    log = logging.getLogger("offsite.test")

    async def work(run: str) -> None:
        with about(run=run):
            with about(round=2):
                await asyncio.sleep(0)
                log.info("two\nlines \x1b[1m of %s", run)
            log.warning("later")

    async def both() -> None:
        await asyncio.gather(work("a"), work("b"))

    asyncio.run(both())
    log.error("after", extra={"fields": {"bytes": 3}})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(line.pop("at") > 1e9 and line.pop("logger") == "offsite.test" for line in lines)
    assert lines[0] == {"level": "info", "site": "ward", "run": "a", "round": 2, "message": "two lines  [1m of a"}
    assert [(line["run"], line.get("round")) for line in lines[:-1]] == [("a", 2), ("a", None), ("b", 2), ("b", None)]
    assert lines[-1] == {"level": "error", "site": "ward", "bytes": 3, "message": "after"}


def test_of_a_fault_the_place_is_told_and_no_value() -> None:
    record = logging.LogRecord("offsite", logging.ERROR, "", 0, "while answering", (), None)
    try:
        raise ValueError("patient Olga")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    line = Lines().format(record)
    assert "Olga" not in line and json.loads(line)["fault"]["kind"] == "ValueError"
    assert json.loads(line)["fault"]["at"][-1].startswith("test_logs.py:")


@pytest.mark.usefixtures("logging_untouched")
def test_for_people_it_is_a_line_of_text_and_of_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    begin("text")
    logging.getLogger("offsite.test").info("nothing")
    logging.getLogger("offsite.test").warning("something")
    assert capsys.readouterr().err.endswith("WARNING offsite.test: something\n")
