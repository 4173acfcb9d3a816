"""What programs read: JSON with the keys that docs/programs.md has."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from offsite.client import session
from offsite.client.answers import Version
from offsite.client.session import Run
from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import from_toml, to_json
from offsite.protos.fields import comments, defaults
from offsite.protos.spec import RunSpec, TrainingSpec

PAGE = (Path(__file__).parent.parent / "docs" / "programs.md").read_text()
ROWS = {
    words: (bool(many), cell) for words, many, cell in re.findall(r"^\| `(.+?)` \| (list of)? ?\| (.*) \|$", PAGE, re.M)
}


def keys(words: str) -> tuple[set[str], set[str]]:
    """The keys that a command's documents always have, and those that they may have."""
    always, _, sometimes = ROWS[words][1].partition(";")
    more: set[str] = set()
    if other := re.match(r"those of `(.+?)`,? ?(?:and )?", always):
        more, _ = keys(other[1])
        always = always[other.end() :]
    return set(re.findall(r"`(\w+)`", always)) | more, set(re.findall(r"`(\w+)`", sometimes))


RUN = pb.RunStatus(id="r1", state="completed", spec=to_json(RunSpec(model="m")), report='{"sites": {}}')


class Coordinator:
    """A session in which a run is completed, as is the round of its one version."""

    def __enter__(self) -> "Coordinator":
        return self

    def __exit__(self, *_: object) -> None: ...

    def call(self, *_: Any, **__: Any) -> pb.RunStatus:
        return RUN

    def stream(self, name: str, request: pb.WatchRequest) -> Iterator[pb.Events]:
        events = [pb.Event(seq=seq, kind="warning", data=json.dumps({"message": f"number {seq}"})) for seq in (3, 5, 9)]
        yield pb.Events(events=[event for event in events if event.seq > request.after])

    def run(self, name: str) -> Run:
        return Run(self, RUN)  # type: ignore[arg-type]

    def submit(self, *_: Any, **__: Any) -> Run:
        return self.run("r1")

    def runs(self, **_: Any) -> list[Run]:
        return [self.run("r1")]

    def sites(self) -> list[session.Site]:
        return [session.Site(name="ward", seen_at=1.0, examples=3, version="0")]

    def versions(self, *_: Any) -> list[Version]:
        return [Version("r1", 1, "", "me", 1.0, "", {}, ("ward",), (), "sha256:0", 0, None)]

    def roll_back(self, *_: Any, **__: Any) -> list[Version]:
        return self.versions()

    def release(self, *_: Any, **__: Any) -> list[Version]:
        return self.versions()


# One after the other, as each makes what the next looks at.
CALLS: dict[str, tuple[str, ...]] = {
    "pki init": ("pki",),
    "pki issue": ("pki", "--role", "coordinator", "owner"),
    "pki token": ("pki", "ward", "--role", "site", "--address", "h:1"),
    "pki renew": ("pki", "owner"),
    "pki ls": ("pki",),
    "pki refresh": ("pki",),
    "pki revoke": ("pki", "owner"),
    "identity profile add": ("work", "--coordinator", "h:1", "--identity", "pki/owner"),
    "identity profile use": ("work",),
    "identity profile ls": (),
    "run new": ("run.toml", "--model", "m"),
    "run submit": ("run.toml",),
    "run ls": (),
    "run show": ("r1",),
    "run wait": ("r1",),
    "run stop": ("r1",),
    "run pull": ("r1", "out"),
    "run sites": (),
    "version ls": (),
    "version show": ("r1:1",),
    "version rollback": ("r1:1", "--reason", "r"),
    "version release": ("r1", "--reason", "r"),
    "identity profile remove": ("work",),
    "data check": ("rows.jsonl",),
    "data preview": ("rows.jsonl",),
    "data split": ("rows.jsonl", "parts", "--share", "0.5"),
    "emulator builders": (),
    "doctor": (),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PROFILE", "COORDINATOR", "IDENTITY"):
        monkeypatch.delenv(f"OFFSITE_{name}", raising=False)
    monkeypatch.setenv("OFFSITE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(session, "connect", lambda *_, **__: Coordinator())
    monkeypatch.setattr(Run, "card", "of a report that is whole")
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"question {at}", "completion": f"answer {at}"}) for at in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_documents_have_the_keys_of_the_page(place: Path, offsite: Any) -> None:
    for words, arguments in CALLS.items():
        end = offsite(*words.split(), *arguments, "--format", "json")
        assert end.returncode == 0 or words == "doctor", end.stderr
        document = json.loads(end.stdout)
        many, _ = ROWS[words]
        assert isinstance(document, list) is many and document, words
        always, sometimes = keys(words)
        for one in document if many else [document]:
            assert always <= one.keys() <= always | sometimes, words


LONG = [  # what it is, and what is beside its fields
    ("cluster status", "coordinator.cluster.view:View", set()),
    ("coordinator backup", "coordinator.backup.inventory:Inventory", {"new"}),
    ("coordinator doctor", "protos.checks:Check", set()),
    ("coordinator gc", "coordinator.retention:Freed", {"dry_run"}),
    ("coordinator restore", "coordinator.backup.inventory:Inventory", {"dry_run"}),
    ("emulator build", "coordinator.bundles.manifests:Description", {"computed", "folder", "recovery"}),
    ("emulator inspect", "coordinator.bundles.manifests:Description", set()),
    ("eval compare", "client.beside:Comparison", set()),
    ("eval forgetting", "client.forgetting:Forgetting", {"summary"}),
    pytest.param("emulator compare", "coordinator.comparison.rows:Comparison", set(), marks=pytest.mark.slow),
    pytest.param("legality", "coordinator.survey.matrix:Matrix", set(), marks=pytest.mark.slow),  # these bring torch
]


@pytest.mark.parametrize(("words", "home", "more"), LONG)
def test_what_takes_long_has_the_keys_of_the_page_as_its_document_has_fields(
    words: str, home: str, more: set[str]
) -> None:
    module, _, name = home.partition(":")
    document = getattr(import_module(f"offsite.{module}"), name)
    assert keys(words)[0] == {field.name for field in fields(document)} | more


def test_a_log_is_told_to_its_end_or_its_last_lines_and_goes_on(place: Path, offsite: Any) -> None:
    at = ("--coordinator", "h:1", "--identity", "kit")
    told = offsite("run", "log", "r1", *at).stdout.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in told] == ["3", "5", "9"] and "warning: number 3" in told[0]
    assert offsite("run", "log", "r1", *at, "--tail", "1").stdout.splitlines() == told[2:]
    assert offsite("run", "log", "r1", *at, "--tail", "0", "--stream").stdout == "\n"
    lines = offsite("run", "log", "r1", *at, "--format", "json", "--stream").stdout.splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [3, 5, 9]
    assert set(json.loads(lines[0])) == {"at", "data", "kind", "round", "seq", "site"}


def test_a_watch_writes_figures_elsewhere_and_names_another_target(place: Path, offsite: Any) -> None:
    pytest.importorskip("tensorboard")
    watch = ("run", "watch", "r1", "--coordinator", "h:1", "--identity", "kit", "--format", "json", "--log")
    told = offsite(*watch, f"tensorboard:{place}/boards")
    assert told.returncode == 0 and len(told.stdout.splitlines()) == 3 and [*(place / "boards" / "r1").iterdir()]
    wrong = offsite(*watch, "board:here")
    assert wrong.returncode == 3 and "expected tensorboard:DIR" in wrong.stderr


def test_waiting_for_a_run_that_failed_says_how_it_ended_and_has_its_exit_code(
    place: Path, offsite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.RUN", pb.RunStatus(id="r1", state="failed", error="nobody came"), raising=True)
    end = offsite("run", "wait", "r1", "--coordinator", "h:1", "--identity", "kit")
    assert (end.returncode, end.stdout) == (10, "run r1 is failed\n") and "nobody came" in end.stderr


@pytest.mark.parametrize("name", ["list", "cancel", "fetch"])
def test_the_names_of_before_are_taken_and_not_shown(name: str, offsite: Any) -> None:
    assert f" {name} " not in offsite("run", "--help").stdout
    assert offsite("run", name, "--help").returncode == 0


def test_a_new_runs_file_reads_back_as_what_was_chosen_and_says_every_field(place: Path, offsite: Any) -> None:
    chosen = ("--set", "method=lora(rank=4)", "--set", "training.steps=5", "--set", "builders=crash(keep=9)+distilled")
    made = offsite("run", "new", "a.toml", "--model", 'a "b"', "--site", "ward", "--exam", "ward=w.jsonl", *chosen)
    assert made.returncode == 0 and "offsite run submit a.toml" in made.stdout
    spec = from_toml(RunSpec, place / "a.toml")
    assert (spec.model, spec.sites, spec.evaluation) == ('a "b"', ("ward",), {"ward": "w.jsonl"})
    assert spec.method.settings == {"rank": 4} and [one.name for one in spec.builders] == ["crash", "distilled"]
    assert spec.training == TrainingSpec(steps=5)
    text = (place / "a.toml").read_text()
    assert all(re.search(rf"^(# )?{name} = .*  # \w", text, re.M) for name in comments(TrainingSpec))
    bare = re.sub(r"^# (?=(?!learning_rate)\w+ = )", "", text, flags=re.M)
    (place / "bare.toml").write_text(bare)
    assert from_toml(RunSpec, place / "bare.toml") == spec, "what is commented out are the defaults"
    again = offsite("run", "new", "a.toml", "--model", "m")
    assert again.returncode == 11 and "is there already" in again.stderr
    assert offsite("run", "new", "c.toml").returncode == 3, "nobody is asked where no terminal is"


@pytest.mark.parametrize("document", [RunSpec, TrainingSpec])
def test_every_field_of_a_run_has_its_sentence(document: type[Any]) -> None:
    said = comments(document)
    assert [*said] == [field.name for field in fields(document)] and all(len(text) > 8 for text in said.values())
    assert defaults(document).keys() >= said.keys() - {"model"}
