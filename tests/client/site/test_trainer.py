import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open

from offsite.client.site.engines import ENGINES
from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.client.site.launch import Trainer, fork_server, launch
from offsite.client.site.trainer import explain
from offsite.emulator.batches import training_batches
from offsite.emulator.examples import collect
from offsite.emulator.modality import default, encode
from offsite.protos import tensors
from offsite.protos.documents import from_json, parse, to_json
from offsite.protos.errors import InputError, MismatchError, ResourceError, RunError
from offsite.protos.processes.forks import ForkServer
from offsite.protos.spec import UpdateMetrics

from .ranks import Loaded

Jobs = Any
ENDLESS = {"steps": 100_000}
TWO = {"processes": 2, "threads": 2}  # one server for all tests of two processes


def until_training(trainer: Trainer) -> Any:
    events = trainer.events()
    assert next(event for event in events if event["event"] == "step")["step"] == 1
    return events


def plain_local_training(job: TrainerJob) -> tuple[dict[str, torch.Tensor], list[float]]:
    """LoRA as anybody would write it with peft and torch, on the layers at both ends of the stored model."""
    training = job.task.training
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(job.bundle, dtype=torch.float32)
    linear = [f"{kind}_proj" for kind in (*"qkvo", "gate", "up", "down")]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=linear, layers_to_transform=[0, 3])
    model = peft.get_peft_model(model, config).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.bundle)
    names = {
        f"{layer}.{path}.{factor}": f"base_model.model.model.layers.{position}.{path}.lora_{factor}.default.weight"
        for position, layer in ((0, 0), (3, 5))
        for path in [f"self_attn.{k}_proj" for k in "qkvo"] + [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
        for factor in "AB"
    }
    model.load_state_dict({names[key]: value for key, value in tensors.load(Path(job.adapter)).items()}, strict=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    warmup, left = training.warmup_steps, training.steps - training.warmup_steps
    curves = {"constant": lambda step: 1.0, "linear": lambda step: (training.steps - step) / left}
    curve = curves[training.schedule.name]
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else curve(step)
    )
    encoded = encode(collect(Path(job.data), default()).examples, tokenizer, max_length=training.max_length)
    losses = []
    for batch in training_batches(
        encoded, batch_size=training.batch_size, steps=training.steps, first_step=0, seed=training.seed
    ):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.gradient_clipping)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    state = model.state_dict()
    return {key: state[name] for key, name in names.items()}, losses


def test_one_site_and_one_round_is_plain_local_training_bit_for_bit(start: Any, job: Jobs, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(Path(job().data).read_text() + '\n{"an odd": "row"}\n')
    one = job(data=data, training={"warmup_steps": 2, "weight_decay": 0.1, "gradient_clipping": 0.05})
    events = list(start(one, tmp_path / "task").events())
    update = tensors.load(tmp_path / "out" / "update.safetensors")
    expected, losses = plain_local_training(one)
    assert update.keys() == expected.keys()
    assert all(torch.equal(update[key], expected[key]) for key in expected)
    assert all(float(value.norm()) > 0 for value in update.values())
    assert [event["event"] for event in events] == ["loading", "data", "inspected", *["step"] * 6, "done"]
    counts = {"examples": 22, "distinct": 22, "sequences": 22, "left_out": 1}
    assert events[1].items() >= counts.items()
    told = tuple(event["loss"] for event in events[3:-1])
    assert told == pytest.approx(losses, rel=1e-6)  # the sum over positions has another order there
    with safe_open(tmp_path / "out" / "update.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["offsite"])
    assert about == {
        "format": 1,
        "run": "run-1",
        "round": 0,
        "site": "clinic",
        "attempt": 0,
        "broadcast": one.task.adapter,
        "method_hash": one.task.method_hash,
    }
    metrics = from_json(UpdateMetrics, (tmp_path / "out" / "metrics.json").read_bytes(), where="metrics")
    assert (metrics.examples, metrics.losses, metrics.engine) == (22, (), "plain, processes: 1, cpu")
    tokens = [event["tokens"] for event in events[3:-1]]
    mean = sum(loss * count for loss, count in zip(told, tokens, strict=True)) / sum(tokens)
    assert (metrics.loss, metrics.tokens) == (pytest.approx(mean), sum(tokens))
    assert metrics.peak_memory_bytes > 50_000_000
    loading, training = metrics.spans
    assert (loading.kind, training.kind) == ("loading", "training")
    assert loading.start < loading.end <= training.start < training.end


def test_a_falling_rate_is_plain_local_training_bit_for_bit(job: Jobs) -> None:
    one = job(training={"warmup_steps": 2, "weight_decay": 0.1, "schedule": "linear"})
    loaded = Loaded(one)
    engine = loaded.engine()
    for batch in loaded.batches:
        engine.step(batch)
    expected, _ = plain_local_training(one)
    update = engine.gather(loaded.method, loaded.places)
    assert all(torch.equal(update[key], expected[key]) for key in expected)
    constant, _ = plain_local_training(job(training={"warmup_steps": 2, "weight_decay": 0.1}))
    assert not any(torch.equal(update[key], constant[key]) for key in expected)


def test_the_same_job_twice_gives_the_same_bytes_and_the_next_round_others(
    start: Any, job: Jobs, tmp_path: Path
) -> None:
    training = {"steps": 3, "precision": "bf16", "warmup_steps": 2, "weight_decay": 0.1}
    again = job(training=training, policy={"per_step_metrics": True})
    later = replace(again, task=replace(again.task, round=1))
    updates = [tmp_path / name / "update.safetensors" for name in ("once", "twice", "later")]
    trainers = [
        start(replace(one, out=str(update.parent)), update.parent)
        for one, update in zip((again, again, later), updates, strict=True)
    ]
    for trainer in trainers:
        assert list(trainer.events())[-1] == {"event": "done"}
    assert updates[0].read_bytes() == updates[1].read_bytes()
    metrics = from_json(UpdateMetrics, updates[0].with_name("metrics.json").read_bytes(), where="metrics")
    assert len(metrics.losses) == 3, "the policy lets each step's loss out"
    first, last = tensors.load(updates[0]), tensors.load(updates[2])
    assert not any(torch.equal(first[key], last[key]) for key in first)


def test_a_broken_line_of_data_is_one_error_that_names_it(start: Any, job: Jobs, tmp_path: Path) -> None:
    data = tmp_path / "notes.jsonl"
    data.write_text('{"prompt": "w1", "completion": "w2"}\n{"question": "w1"}\n')
    trainer = start(job(data=data, policy={"odd_rows": "refuse"}), tmp_path / "task")
    events = trainer.events()
    assert next(events) == {"event": "loading"}
    with pytest.raises(InputError, match=r"notes.jsonl, line 2: found the columns \['question'\]") as error:
        list(events)
    assert error.value.reason == "FAULT_DATA"
    assert [process.poll() for process in trainer.processes] == [InputError.exit_code]
    assert "Traceback" in (tmp_path / "task" / "rank-0.log").read_text()
    assert not (tmp_path / "out").exists()


STAND_IN = """
import os, sys, time
from types import SimpleNamespace
from offsite.protos.errors import MismatchError

def train(job, say, rendezvous):
    if job.task.run == "mismatch" and os.environ["RANK"] == "1":
        raise MismatchError("not what was agreed")
    say("step", step=1)
    time.sleep(0 if job.task.run == "short" else 1000)

engine = SimpleNamespace(preload=lambda: time.sleep(0.3))
sys.modules["offsite.client.site.engines"] = SimpleNamespace(ENGINES={"plain": engine})
sys.modules["offsite.client.site.training"] = SimpleNamespace(train=train)
"""


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    """A server whose trainers do all that trainers do but train: it imports for a moment only."""
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = fork_server(EngineSpec(name="plain", device="cpu", processes=2), tmp_path / "server.log")
    yield server
    server.close()


def named(job: TrainerJob, run: str) -> TrainerJob:
    return replace(job, task=replace(job.task, run=run))


@pytest.mark.slow(alone=True)
def test_trainers_end_when_their_agent_is_killed(idle: ForkServer, job: Jobs, tmp_path: Path) -> None:
    (tmp_path / "wanted.json").write_bytes(to_json(job(processes=2)))
    agent = """if True:
        import sys
        from pathlib import Path
        from offsite.client.site.job import TrainerJob
        from offsite.client.site.launch import fork_server, launch
        from offsite.protos.documents import from_json
        job = from_json(TrainerJob, Path(sys.argv[1]).read_bytes(), where="job")
        folder = Path(sys.argv[2])
        server = fork_server(job.engine, folder.with_name("log"))
        for event in launch(job, folder, server).events():
            print(event["event"], flush=True)
    """
    command = [sys.executable, "-c", agent, str(tmp_path / "wanted.json"), str(tmp_path / "task")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert next(line for line in parent.stdout if line == "step\n")
        # One who looks at all processes while some begin may miss one.
        while len(trainers := psutil.Process(parent.pid).children(recursive=True)) < 3 and parent.poll() is None:
            continue
        parent.kill()
    assert len(trainers) == 3, "the server, and two ranks"
    _, alive = psutil.wait_procs(trainers, timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow(alone=True)
@pytest.mark.parametrize("name", ENGINES)
def test_a_server_imports_and_computes_nothing_and_its_trainers_have_what_is_theirs(
    start: Any, job: Jobs, tmp_path: Path, name: str
) -> None:
    """A copy of a process with several threads may hang, and only the copy is to have what its rank is told."""
    trainer = start(job(training=ENDLESS, name=name, **TWO), tmp_path / "task")
    events = until_training(trainer)
    ranks = [psutil.Process(process.pid) for process in trainer.processes]
    parent = ranks[0].parent()
    assert parent is not None and parent == ranks[1].parent() and parent.parent() == psutil.Process()
    assert parent.environ()["OMP_NUM_THREADS"] == "2", "the engine's own setting comes before this process's"
    assert parent.num_threads() == 1 and all(rank.num_threads() > 1 for rank in ranks)
    assert os.getsid(parent.pid) == parent.pid and [os.getsid(rank.pid) for rank in ranks] == [r.pid for r in ranks]
    trainer.stop()
    with pytest.raises(RunError, match="stopped"):
        list(events)
    assert parent.is_running() and not parent.children(), "the server stays for the next task"


def test_a_trainer_ends_when_its_input_does(start: Any, job: Jobs, tmp_path: Path) -> None:
    trainer = start(job(training=ENDLESS), tmp_path / "task")
    events = until_training(trainer)
    os.close(trainer._leash)
    trainer._leash = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(RunError, match=r"exit codes \[1\]"):
        list(events)


def test_a_stopped_trainer_is_gone_and_says_so(start: Any, job: Jobs, tmp_path: Path) -> None:
    trainer = start(job(training=ENDLESS), tmp_path / "task")
    events = until_training(trainer)
    trainer.stop()
    assert not psutil.pid_exists(trainer.processes[0].pid)
    with pytest.raises(RunError, match="stopped"):
        list(events)
    trainer.stop()


@pytest.mark.slow(alone=True)
def test_a_trainer_may_be_stopped_before_its_server_is_ready(idle: ForkServer, job: Jobs, tmp_path: Path) -> None:
    trainer = launch(job(processes=2), tmp_path / "task", idle)
    trainer.stop()
    assert all(process.poll() for process in trainer.processes)


def test_a_killed_process_is_told_apart_from_a_fault(start: Any, job: Jobs, tmp_path: Path) -> None:
    trainer = start(job(training=ENDLESS, **TWO), tmp_path / "task")
    events = until_training(trainer)
    os.kill(trainer.processes[1].pid, signal.SIGKILL)
    with pytest.raises(ResourceError, match="process 1 was killed by signal 9"):
        list(events)
    assert not any(psutil.pid_exists(process.pid) for process in trainer.processes)


@pytest.mark.slow
def test_a_killed_server_costs_its_trainers_the_next_task_has_another_and_a_closed_one_ends(
    idle: ForkServer, job: Jobs, tmp_path: Path
) -> None:
    others = {*psutil.Process().children()}
    trainer = launch(job(), tmp_path / "task", idle)
    events = until_training(trainer)
    rank = psutil.Process(trainer.processes[0].pid)
    os.kill(rank.ppid(), signal.SIGKILL)
    with pytest.raises(ResourceError, match="process 0 was killed by signal 9"):
        list(events)
    _, alive = psutil.wait_procs([rank], timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    assert list(launch(named(job(), "short"), tmp_path / "next", idle).events())[-1] == {"event": "done"}
    (server,) = {*psutil.Process().children()} - others
    idle.close()
    assert not server.is_running()


def test_a_trainer_that_cannot_start_is_told_with_the_end_of_its_log(
    idle: ForkServer, job: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").unlink()
    (tmp_path / "offsite.py").write_text("raise SystemExit('a broken installation')")
    with pytest.raises(RunError, match=r"exit codes \[1\]\n.*a broken installation"):
        list(launch(job(), tmp_path / "task", idle).events())


@pytest.mark.slow(alone=True)
def test_an_error_that_is_told_is_raised_once_whichever_process_tells_it(
    idle: ForkServer, job: Jobs, tmp_path: Path
) -> None:
    trainer = launch(named(job(processes=2), "mismatch"), tmp_path / "task", idle)
    with pytest.raises(MismatchError, match="^not what was agreed$"):
        list(trainer.events())
    assert not any(psutil.pid_exists(process.pid) for process in trainer.processes)


def test_running_out_is_told_as_such() -> None:
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "disk is full" in str(explain(full))
    assert explain(OSError(28, "No space left on device")).exit_code == ResourceError.exit_code
    with pytest.raises(RuntimeError) as memory:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert "ran out of memory" in str(explain(memory.value))
    assert str(explain(KeyError("two\nlines"))) == "KeyError: 'two\\nlines'"
    assert explain(KeyError("x")).status == "INTERNAL"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded as Linux does")
def test_a_round_for_which_memory_is_short_is_told_so_and_ends_as_any_other_with_fewer_rows_at_once(
    job: Jobs, tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(
        "\n".join(json.dumps({"text": " ".join(f"w{(at * at + n) % 60}" for at in range(500))}) for n in range(16))
    )
    whole = job(data=data, training={"steps": 1, "batch_size": 16, "max_length": 512}, device="cpu")
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    with closing(ForkServer("narrow", ["plain"], environment=environment, log=tmp_path / "log")) as server:
        with pytest.raises(ResourceError, match="ran out of memory") as error:
            list(launch(whole, tmp_path / "task", server).events())
        assert error.value.reason == "FAULT_MEMORY"
        one = replace(whole, engine=replace(whole.engine, micro_batch=1))
        events = list(launch(one, tmp_path / "task", server).events())
    assert [event["step"] for event in events if event["event"] == "step"] == [1]


def test_an_offload_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="offload needs the engine 'deepspeed'"):
        parse(EngineSpec, {"offload": True, "zero_stage": 0}, where="engine")


def test_the_agent_starts_trainers_without_loading_torch() -> None:
    code = "import sys, offsite.client.site.agent; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
