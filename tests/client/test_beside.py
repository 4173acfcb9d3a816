"""Runs beside each other: which are submitted, and what of their reports is shown."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from offsite.client.beside import compare, isolated
from offsite.client.commands.eval import app, side_by_side
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.spec import RunSpec


def report(plug_in: float, **more: Any) -> dict[str, Any]:
    return {
        "base": {"digest": "b3:1"},
        "sites": {"bank": {"base_zero_shot": 9.0, "plug_in": plug_in}, "ward": {"base_zero_shot": 7.0}},
        "overall": {"base_zero_shot": 8.0, "plug_in": plug_in},
        "bytes": {"up": 5_000_000},
    } | more


class Coordinator:
    """What a session is asked."""

    def __init__(self, *names: str) -> None:
        self.names, self.submitted = names, [("", RunSpec(model="m"))][:0]

    def sites(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.names]

    def submit(self, spec: RunSpec, *, token: str) -> str:
        self.submitted.append((token, spec))
        return f"run {len(self.submitted)}"


def test_each_site_alone_takes_the_steps_that_it_would_take_among_all() -> None:
    session: Any = Coordinator("bank", "ward")
    spec = RunSpec(model="m", name="wards", rounds=3, min_sites=2)
    assert isolated(session, spec, token="t") == {"bank alone": "run 1", "ward alone": "run 2"}
    for (token, one), site in zip(session.submitted, ("bank", "ward"), strict=True):
        assert token == f"t-{site}" and (one.sites, one.min_sites, one.name) == ((site,), 1, f"wards: {site} alone")
        assert (one.rounds, one.training, one.method) == (spec.rounds, spec.training, spec.method)
    chosen: Any = Coordinator("bank", "ward")
    assert [*isolated(chosen, RunSpec(model="m", sites=("ward",)))] == ["ward alone"]
    assert chosen.submitted[0][0] == "", "each time another run"
    with pytest.raises(ConflictError, match="no site is enrolled yet"):
        isolated(Coordinator(), spec)  # type: ignore[arg-type]


def test_a_figure_of_several_runs_stands_side_by_side_the_best_marked() -> None:
    comparison = compare({"all three": report(4.0), "bank [alone]": report(5.5)})
    assert comparison.sets == ("bank", "ward", "overall")
    assert comparison.base == {"bank": 9.0, "ward": 7.0, "overall": 8.0}
    assert comparison.runs["bank [alone]"] == {"bank": 5.5, "ward": None, "overall": 5.5}
    console = Console(width=80, record=True, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(side_by_side(comparison))
    text = console.export_text(styles=True)
    assert "bank [alone]" in text and re.search(r"\x1b\[1;32m *4.00", text) and not re.search(r"1;32m *5.50", text)


def test_what_says_nothing_of_each_other_is_not_compared() -> None:
    with pytest.raises(InputError, match="a and b are of two base models"):
        compare({"a": report(4.0), "b": report(4.0, base={"digest": "b3:2"})})
    with pytest.raises(InputError, match="none of these runs has measured attack"):
        compare({"a": report(4.0)}, figure="attack")


def test_reports_are_read_from_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "report.json").write_text(json.dumps(report(4.0)))
    (tmp_path / "other.json").write_text(json.dumps(report(5.0)))
    given = ["compare", f"federated={tmp_path / 'demo'}", str(tmp_path / "other.json")]
    told = json.loads(CliRunner().invoke(app, [*given, "--format", "json"], catch_exceptions=False).stdout)
    assert told["runs"]["federated"]["overall"] == 4.0
    assert "federated" in CliRunner().invoke(app, given, catch_exceptions=False).stdout


@pytest.mark.parametrize(
    ("content", "why"), [("{", "no report of a run"), ("[]", "expected the report.json"), (None, "no such file")]
)
def test_what_is_no_report_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, why: str
) -> None:
    monkeypatch.setenv("OFFSITE_CONFIG", str(tmp_path / "none.toml"))
    file = tmp_path / "one.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=why):
        CliRunner().invoke(app, ["compare", str(file)], catch_exceptions=False)
