"""What commands print, without a process."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from offsite.client import session
from offsite.client.commands import run, site
from offsite.client.session import Run
from offsite.client.site.agent import Agent
from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import to_json
from offsite.protos.security.pki import Authority
from offsite.protos.spec import RunSpec


class Liar:
    """A session with a coordinator whose times are no numbers."""

    def __enter__(self) -> "Liar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, name: str) -> Run:
        reply = pb.RunStatus(id=name, submitted_at=math.nan, finished_at=math.inf, spec=to_json(RunSpec(model="m")))
        return Run(self, reply)  # type: ignore[arg-type]

    def runs(self, **_: Any) -> list[Run]:
        return [self.run("r")]

    def sites(self) -> list[session.Site]:
        return [session.Site(name="ward", seen_at=-math.inf, examples=3, version="0")]


@pytest.mark.parametrize("command", [("show", "r"), ("list",), ("sites",)])
def test_times_that_are_no_numbers_are_null_in_json(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "connect", lambda *_, **__: Liar())
    where = ("--coordinator", "127.0.0.1:1", "--identity", str(tmp_path))
    text = CliRunner().invoke(run.app, [*command, *where, "--format", "json"], catch_exceptions=False).stdout
    told = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    one = told if isinstance(told, dict) else told[0]
    times = [one[name] for name in ("submitted_at", "finished_at", "seen_at") if name in one]
    assert times and not any(times)


@pytest.mark.parametrize(("rows", "warned"), [(3, True), (4, False)])
@pytest.mark.parametrize("how", ["text", "json"])
def test_a_site_with_fewer_examples_than_its_policy_wants_is_warned_when_it_joins(
    how: str, rows: int, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agent, "run", lambda _: None)
    kit = Authority.create(tmp_path / "pki").issue("site", "ward")
    (tmp_path / "notes.jsonl").write_text("".join(f'{{"text": "note {row}"}}\n' for row in (0, *range(rows))))
    (tmp_path / "policy.toml").write_text(f'bases = ["any"]\ndata = ["{tmp_path}"]\nmin_rows = 4\n')
    place = ["127.0.0.1:1", "--identity", kit, "--policy", tmp_path / "policy.toml", "--data", tmp_path / "notes.jsonl"]
    asked = ["join", *map(str, place), "--work", str(tmp_path / "work"), "--format", how]
    told = CliRunner().invoke(site.app, asked, catch_exceptions=False).stdout
    assert ("holds 3 distinct examples" in told and "at least 4 distinct sequences" in told) is warned
