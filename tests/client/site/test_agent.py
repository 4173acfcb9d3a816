"""What the agent hands a trainer of the site's policy, and what it says of what the trainer tells."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offsite.client.site import agent, rows
from offsite.client.site.approvals import Approvals, request
from offsite.client.site.folder import WorkFolder
from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.client.site.meter import Meter
from offsite.client.site.policy import Policy
from offsite.client.site.reasons import faults, reason
from offsite.client.site.reporter import Reporter
from offsite.coordinator.service.reasons import sentence
from offsite.protos import fleet_pb2 as pb
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import from_json, to_json
from offsite.protos.errors import (
    IdentityError,
    InputError,
    MismatchError,
    OffsiteError,
    RefusedError,
    ResourceError,
    UnreachableError,
    from_status,
)
from offsite.protos.processes.forks import ForkServer
from offsite.protos.spec import UpdateMetrics

STEP = {"event": "step", "step": 1, "steps": 6, "loss": 4.0, "tokens": 9}
WARNINGS = ["the emulator predicts worse than guessing", "another"]
LEAKS = {
    "leak-columns": '{"SECRET": "note"}\n',
    "leak-role": '{"messages": [{"role": "SECRET", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
    "broken": '{"text": SECRET\n',
}
REFUSED = RefusedError("this site's policy refuses the emulator (suspicious): a sign")


class Trainer:
    """Tells of an inspection and a step, or refuses."""

    def __init__(self, job: TrainerJob, refused: bool) -> None:
        self.job, self._refused = job, refused

    def events(self) -> Iterator[dict[str, Any]]:
        yield {"event": "loading"}
        if self._refused:
            raise REFUSED
        yield {"event": "inspected", "perplexity": 7.5e4, "warnings": WARNINGS}
        yield STEP
        metrics = UpdateMetrics(examples=1, tokens=9, loss=4.0, engine="none")
        (Path(self.job.out) / "metrics.json").write_bytes(to_json(metrics))

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("refused", [False, True])
def test_the_policys_care_reaches_the_trainer_and_its_findings_the_log(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    started: list[TrainerJob] = []

    def launch(wanted: TrainerJob, folder: Path, server: ForkServer) -> Trainer:
        started.append(from_json(TrainerJob, to_json(wanted), where="job"))
        return Trainer(wanted, refused)

    monkeypatch.setattr(agent, "launch", launch)
    monkeypatch.setattr(ForkServer, "start", lambda server: None)
    one, said = job(), []
    policy = Policy(bases=("any",), data=("/",), max_emulator_perplexity=5e4, suspicious="warn")
    work: Any = SimpleNamespace(write=lambda *_: None, secret=tmp_path / "secret", path=tmp_path)
    work.clear_residuals, work.anchor, work.reservoirs = id, lambda task: None, lambda task: []
    work.micro_batch = lambda task: 0
    config: Any = SimpleNamespace(policy=policy, data=tmp_path, engine=one.engine, work=work, meter=Meter())
    channel: Any = SimpleNamespace(
        grpc=SimpleNamespace(unary_unary=id_stub, unary_stream=id_stub, stream_stream=id_stub)
    )
    site = agent.Agent(channel, config, say=lambda kind, data: said.append((kind, data)))
    monkeypatch.setattr(site, "_fetch", lambda task, reporter: (one.manifest, tmp_path, tmp_path / "adapter"))
    reporter: Any = SimpleNamespace(now=lambda *_, **__: None, on_stop=id, stopped=False, bytes_down=0)
    if refused:
        with pytest.raises(RefusedError, match="a sign"):
            site._train(one.task, tmp_path, reporter)
        return
    site._train(one.task, tmp_path, reporter)
    assert started[0].policy == policy
    assert said == [
        ("inspected", {"round": 1, "perplexity": 7.5e4}),
        *[("warning", {"message": warning}) for warning in WARNINGS],
        ("step", {"round": 1, "step": 1, "steps": 6, "loss": 4.0}),
    ]


def test_an_agent_outlives_a_coordinator_that_is_broken_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkFolder.open(tmp_path / "work", SimpleNamespace(name="clinic", authority=b""))  # type: ignore[arg-type]
    settings = {"identity": SimpleNamespace(warning=None), "engine": EngineSpec()}
    config: Any = SimpleNamespace(work=work, policy=Policy(bases=("any",), data=()), meter=Meter(), **settings)
    channel: Any = SimpleNamespace(
        grpc=SimpleNamespace(unary_unary=id_stub, unary_stream=id_stub, stream_stream=id_stub)
    )
    said: list[str] = []
    site = agent.Agent(channel, config, say=lambda kind, data: said.append(data["message"]))
    kinds = (IdentityError, MismatchError, OffsiteError, UnreachableError)
    troubles: list[Any] = [kind(f"trouble {at}") for at, kind in enumerate(kinds)]
    troubles += [OSError(28, "No space left on device"), None, KeyboardInterrupt()]

    def once() -> None:
        if trouble := troubles.pop(0):
            raise trouble

    monkeypatch.setattr(agent, "RETRY_S", 0.0)
    monkeypatch.setattr(site, "_enrol", lambda: None)
    monkeypatch.setattr(site, "_once", once)
    with pytest.raises(KeyboardInterrupt):
        site.run()
    assert said[:4] == [f"trouble {at}" for at in range(4)] and "disk is full" in said[4]
    monkeypatch.setattr(agent, "PATIENCE_S", -1.0)
    troubles.append(IdentityError("revoked"))
    with pytest.raises(IdentityError, match="revoked"):
        site.run()
    work.close()


class Owner:
    """A coordinator's end of a channel: accepts updates, or fails, and remembers what was sent."""

    def __init__(self) -> None:
        self.grpc = SimpleNamespace(unary_unary=id_stub, unary_stream=id_stub, stream_stream=id_stub)
        self.sent: list[bytes] = []
        self.target = "tuning.example.org:8443"
        self.error: Exception | None = None

    def call(self, *_: Any, **__: Any) -> None:
        pass

    def upload(self, _: Any, header: Any, file: Path) -> None:
        self.sent.append(file.read_bytes())
        if self.error:
            raise self.error


@pytest.fixture
def fed_back(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An agent whose trainers leave out of each update what they were given to go on from, and a number."""

    class Leaving(Trainer):
        def events(self) -> Iterator[dict[str, Any]]:
            before = Path(self.job.residual).read_text() if self.job.residual else ""
            self.numbers.append(before)
            for name in ("update", "residual"):
                text = f"{before}{self.job.task.round}"
                (Path(self.job.out) / f"{name}.safetensors").write_text(text)
                (Path(self.job.out) / f"{name}.digest").write_text(digest_bytes(text.encode()))
            yield from super().events()

        numbers: list[str] = []

    def launch(wanted: TrainerJob, folder: Path, server: ForkServer) -> Trainer:
        return Leaving(wanted, refused=False)

    monkeypatch.setattr(agent, "launch", launch)
    monkeypatch.setattr(ForkServer, "start", lambda server: None)
    work = WorkFolder.open(tmp_path / "work", SimpleNamespace(name="clinic", authority=b""))  # type: ignore[arg-type]
    settings = {"identity": SimpleNamespace(name="clinic"), "engine": EngineSpec(), "data": tmp_path}
    policy = Policy(bases=("any",), data=("/",), min_rows=1)
    owner, said = Owner(), list[str]()
    config: Any = SimpleNamespace(work=work, policy=policy, meter=Meter(), **settings)
    site = agent.Agent(owner, config, say=lambda _, data: said.append(str(data)))  # type: ignore[arg-type]
    monkeypatch.setattr(site, "_fetch", lambda task, reporter: (job().manifest, tmp_path, tmp_path / "adapter"))
    reporter: Any = SimpleNamespace(now=lambda *_, **__: None, on_stop=id, stopped=False, bytes_down=0, key=None)

    def do(round: int, previous: str | None = None, *, attempt: int = 0, steps: int = 6) -> None:
        task = replace(job(training={"steps": steps}).task, round=round, rounds=9, previous=previous, attempt=attempt)
        site._do(task, reporter)

    yield SimpleNamespace(
        do=do, owner=owner, said=said, began=Leaving.numbers, work=work, config=config, reporter=reporter
    )
    work.close()


def test_what_was_left_out_goes_on_with_the_update_that_the_coordinator_has(fed_back: Any) -> None:
    site = fed_back
    first = digest_bytes(b"0")
    site.do(0)
    site.owner.error = UnreachableError("gone")
    with pytest.raises(UnreachableError):
        site.do(1, first)
    with pytest.raises(UnreachableError):
        site.do(1, first)  # as after a kill: what is made is not made again
    site.owner.error = None
    site.do(1, first)
    assert site.owner.sent == [b"0", b"01", b"01", b"01"] and site.began == ["", "0"]
    site.do(1, first, attempt=1)  # its update was lost at the coordinator: from where it began before
    site.do(2, digest_bytes(b"01"))
    assert site.owner.sent[-2:] == [b"01", b"012"] and site.began == ["", "0", "0", "01"]
    assert "is gone" not in "".join(site.said)
    site.do(3, digest_bytes(b"another"))
    assert site.began[-1] == "" and "left out of this site's last update in run run-1 is gone" in "".join(site.said)


@pytest.mark.parametrize("name", ["update.safetensors", "update.digest", "metrics.json"])
def test_an_update_that_a_kill_left_without_one_of_its_files_is_made_again(fed_back: Any, name: str) -> None:
    site = fed_back
    site.owner.error = UnreachableError("gone")
    with pytest.raises(UnreachableError):
        site.do(0)
    (file,) = site.work.path.glob(f"tasks/*/*/{name}")
    file.unlink()
    site.owner.error = None
    site.do(0)
    assert site.owner.sent == [b"0", b"0"] and site.began == ["", ""]


@pytest.mark.parametrize("case", ["leak-columns", "leak-role", "broken"])
@pytest.mark.parametrize("odd_rows", ["skip", "refuse"])
def test_of_bad_data_the_coordinator_is_told_one_reason_and_the_sites_log_the_rest(
    job: Any, tmp_path: Path, case: str, odd_rows: str
) -> None:
    secret = "a private sentence of this site"
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" / "notes.jsonl"
    data.write_text(LEAKS[case].replace("SECRET", secret))
    one = job(data=data, policy={"odd_rows": odd_rows})
    sent: list[Any] = []
    channel: Any = SimpleNamespace(
        grpc=SimpleNamespace(unary_unary=id_stub, unary_stream=id_stub, stream_stream=id_stub),
        call=lambda _, request: sent.append(request),
    )
    work = WorkFolder.open(tmp_path / "work", SimpleNamespace(name="clinic", authority=b""))  # type: ignore[arg-type]
    config: Any = SimpleNamespace(work=work, engine=EngineSpec(), meter=Meter(), policy=one.policy)
    site = agent.Agent(channel, config, say=lambda *_: None)
    work.task(one.task).mkdir(parents=True)
    (work.task(one.task) / "rank-0.log").write_text(f"Traceback: {secret}")
    with pytest.raises(InputError) as caught, faults("FAULT_DATA"):
        rows.read(one)
    fault = from_status(caught.value.status, str(caught.value), reason=caught.value.reason)  # as it leaves the trainer
    reporter = Reporter(channel, None, one.task, every_s=1000.0, meter=Meter())  # type: ignore[arg-type]
    reporter._fleet = SimpleNamespace(Report=None)  # type: ignore[assignment]
    site._end(one.task, reporter, fault)
    reporter.close()
    work.close()
    (report,) = sent
    assert (report.state, report.reason) == (pb.FAILED, pb.FAULT_DATA)
    told = str(report) + sentence(report.reason)
    assert not any(part in told for part in (secret, "notes", str(tmp_path), "line"))
    kept = (tmp_path / "work" / "site.log").read_text()
    assert kept.count(secret) == 2 - (case == "broken") and str(data) in kept


@pytest.fixture
def careful(fed_back: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A maker of agents whose policy asks a person, and what that person decides while the agent waits."""
    decisions, states = list[tuple[Any, str]](), list[Any]()
    approvals = Approvals(fed_back.work.path)

    def look(seconds: float) -> None:
        (waiting,) = (one for one in approvals.all() if one.state == "pending")
        state, why = decisions.pop(0)
        if state:
            approvals.decide(waiting.id, state, why=why)

    def ask(approve: str) -> None:
        fed_back.config.policy = replace(fed_back.config.policy, approve=approve)

    monkeypatch.setattr(agent, "time", SimpleNamespace(sleep=look, time=time.time, monotonic=time.monotonic))
    fed_back.reporter.now = lambda state, **_: states.append(state)
    return SimpleNamespace(**vars(fed_back), ask=ask, decisions=decisions, states=states, approvals=approvals)


def test_a_person_allows_what_a_run_asks_for_once_and_is_asked_anew_for_anything_else(careful: Any) -> None:
    careful.ask("first")
    careful.decisions[:] = [(None, ""), (None, ""), ("approved", "")]
    careful.do(0)
    assert careful.states[0] == pb.AWAITING_APPROVAL and careful.owner.sent == [b"0"] and not careful.decisions
    careful.do(1, digest_bytes(b"0"))  # the file holds after a restart, too: nothing else was kept
    assert careful.owner.sent == [b"0", b"01"]
    careful.decisions[:] = [("rejected", "too many steps")]
    with pytest.raises(RefusedError, match=r"\(approve\): .* has rejected it: too many steps") as error:
        careful.do(2, digest_bytes(b"01"), steps=7)
    assert error.value.reason == "BOUND_APPROVE" and reason(error.value) in pb.Reason.keys()
    with pytest.raises(RefusedError):
        careful.do(2, digest_bytes(b"01"), steps=7)
    approved, rejected = careful.approvals.all()
    assert "steps: 6 a round" in "".join(approved.plan) and "steps: 7 a round" in "".join(rejected.plan)
    told = "".join(careful.said)
    assert f"offsite site pending {careful.work.path}" in told and "'state': 'approved'" in told
    careful.approvals.decide(rejected.id, "approved")
    careful.do(2, digest_bytes(b"01"), steps=7)


def test_a_person_may_be_asked_in_every_round_and_a_run_that_ends_meanwhile_is_let_go(careful: Any) -> None:
    careful.ask("each")
    for number in range(2):
        careful.decisions[:] = [("approved", "")]
        careful.do(number, digest_bytes(b"0") if number else None)
    assert [one.plan[0] for one in careful.approvals.all()] == [f"run run-1, round {n} of 9" for n in (1, 2)]
    careful.reporter.stopped = True
    with pytest.raises(agent.Stopped):
        careful.do(2, digest_bytes(b"01"))


def test_a_plan_says_in_words_what_is_trained_and_what_leaves(job: Any) -> None:
    task = job().task
    policy = Policy(bases=("any",), data=(), approve="first", max_steps=50)
    wish = request(task, policy, asked_by="tuning.example.org:8443")
    assert wish and request(task, replace(policy, approve="none"), asked_by="") is None
    text = "\n".join(wish.plan)
    for words in (
        "run run-1, rounds: 1",
        "asked by: tuning.example.org:8443; signed by the model's owner",
        "method: lora(rank=4,alpha=8.0)",
        "steps: 6 a round (at most 50 allowed), of 4 sequences",
        "objective supervised, optimiser adamw",
        "stages before the update leaves: none",
        "how many sequences and tokens it saw, and their mean loss",
    ):
        assert words in text


@pytest.mark.parametrize("opened", [False, True])
def test_a_log_and_what_a_machine_gives_leave_only_where_the_policy_says_so(
    fed_back: Any, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    usage = {"memory_bytes": 7_000_000, "cpu_s": 1.5, "gpu_bytes": 0}
    roomy, told = agent.launch, list[dict[str, Any]]()

    def launch(wanted: TrainerJob, folder: Path, server: ForkServer) -> Any:
        (folder / "rank-0.log").write_text("".join(f"line {n}\n" for n in range(9)))
        return roomy(wanted, folder, server)

    monkeypatch.setattr(agent, "launch", launch)
    monkeypatch.setitem(STEP, "usage", usage)
    fed_back.config.policy = replace(fed_back.config.policy, usage=opened, logs=opened)
    fed_back.reporter.now = lambda state, **about: told.append(about) if state == pb.TRAINING else None
    fed_back.do(0)
    lines = [f"line {n}" for n in range(4, 9)]
    step = {"step": 1, "steps": 6}
    assert told == [{**step, "usage": pb.Usage(**usage), "lines": lines} if opened else {**step, "lines": []}]


@pytest.fixture
def short(fed_back: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An agent on a machine that has no room for three rows at once, and the rows that its trainers had in work."""
    asked = list[int]()
    roomy = agent.launch

    def launch(wanted: TrainerJob, folder: Path, server: ForkServer) -> Any:
        asked.append(wanted.engine.micro_batch)
        if not 0 < wanted.engine.micro_batch < 3:
            raise ResourceError("out of memory", reason="FAULT_MEMORY")
        return roomy(wanted, folder, server)

    monkeypatch.setattr(agent, "launch", launch)
    return SimpleNamespace(**vars(fed_back), asked=asked)


def test_a_site_short_of_memory_has_half_as_many_rows_in_work_and_begins_so_in_later_rounds(short: Any) -> None:
    short.do(0)
    assert short.asked == [0, 2] and short.owner.sent == [b"0"]
    assert "begins anew with 2 sequences in work at once" in "".join(short.said)
    short.do(1, digest_bytes(b"0"))
    assert short.asked == [0, 2, 2]


@pytest.mark.parametrize("rows", [0, 3])
def test_memory_that_ends_with_one_row_or_with_what_the_site_chose_fails_the_task(
    short: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    def launch(wanted: TrainerJob, folder: Path, server: ForkServer) -> Any:
        short.asked.append(wanted.engine.micro_batch)
        raise ResourceError("out of memory", reason="FAULT_MEMORY")

    monkeypatch.setattr(agent, "launch", launch)
    short.config.engine = EngineSpec(micro_batch=rows)
    with pytest.raises(ResourceError, match="out of memory"):
        short.do(0)
    assert short.asked == ([3] if rows else [0, 2, 1])


def id_stub(*_: Any, **__: Any) -> None:
    """A call that is never made."""
