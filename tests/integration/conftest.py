"""A federation of real processes on loopback: certificates, a coordinator, site agents, a tiny model, data."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from offsite.client import Choice, Run, RunSpec, Session, TrainingSpec, connect
from offsite.client.channel import Channel
from offsite.protos import fleet_pb2 as pb
from offsite.protos import fleet_pb2_grpc, tensors
from offsite.protos.chunks import digest_file
from offsite.protos.documents import from_json, to_json
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Authority
from offsite.protos.security.signing import verify
from offsite.protos.spec import TaskSpec, UpdateMetrics

from .clusters import Cluster
from .machines import Machine, machines
from .warm import Copy, Warm

DEADLINE_S = 180.0  # of a wait for something that takes seconds: a test that hangs must fail
WORDS = [f"w{n}" for n in range(120)]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def wait_until(true: Callable[[], Any], what: str) -> Any:
    """Return the first true value of a question asked again and again."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {DEADLINE_S:.0f} s")


class Federation:
    """Processes under one folder, with more in their environment if need be; none outlives the tests it is for.

    They run in a machine if one is given, and then its folder is theirs. Coordinators that do steps themselves, and
    agents whose trainers use plain torch, are copies of a warm process if one is given.
    """

    def __init__(
        self,
        folder: Path,
        material: Path,
        *,
        machine: Machine | None = None,
        warm: Warm | None = None,
        **environment: str,
    ) -> None:
        self.folder, self.material, self._machine, self._warm = folder, material, machine, warm
        self._environment = os.environ | ENVIRONMENT | environment
        self.authority = Authority.create(folder / "pki")
        self.authority.issue("coordinator", "coordinator")
        self.owner = self.authority.issue("owner", "olga")
        self.researcher = self.authority.issue("researcher", "alice")
        self.address = ""
        self._addresses: dict[str, str] = {}
        self._children: dict[str, subprocess.Popen[bytes] | Copy] = {}

    def start(
        self, name: str, *arguments: str, program: tuple[str, ...] = ("-m", "offsite.client"), warm: bool = False
    ) -> None:
        """Run `offsite ARGUMENTS`, or another program of Python's, output to a log that later starts append to."""
        popen = self._machine.popen if self._machine else subprocess.Popen
        with self.log(name).open("ab") as log:
            if self._warm and warm:
                self._children[name] = self._warm.start(arguments, self._environment, log)
                return
            self._children[name] = popen(
                [sys.executable, *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        lines = self.log(name).read_text().splitlines() if self.log(name).exists() else []
        told = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in told if line.get("event") == event]

    def expect(self, name: str, event: str, *, count: int = 1) -> dict[str, Any]:
        """Wait for a process to say something for the count-th time."""

        def said() -> Any:
            found = self.events(name, event)
            if len(found) >= count:
                return found[count - 1]
            assert self._children[name].poll() is None, f"{name} ended:\n{self.log(name).read_text()}"
            return None

        return dict(wait_until(said, f"{name}: {event}"))

    def coordinate(
        self,
        *more: str,
        name: str = "coordinator",
        executor: str = "threads",
        policy: str = "",
        home: str = "home",
    ) -> str:
        """Start the coordinator, on the port it had before if it was started before; `policy` is TOML.

        Another name makes one more gateway, to be given a home and an environment of its stores; return its address.
        """
        ready = len(self.events(name, "ready"))
        kit = str(self.folder / "pki" / "coordinator")
        file = self.folder / "owner.toml"
        file.write_text(policy)
        listen = self.address if name == "coordinator" else self._addresses.get(name)
        self.start(
            name,
            *("coordinator", "up", "--home", str(self.folder / home), "--identity", kit, "--executor", executor),
            *("--policy", str(file)),
            *("--listen", listen or "127.0.0.1:0", "--format", "json", "--threads", "1", *more),
            warm=executor == "threads",
        )
        address = self._addresses[name] = str(self.expect(name, "ready", count=ready + 1)["address"])
        if name == "coordinator":
            self.address = address
        return address

    def join(
        self,
        name: str,
        *,
        identity: Path | None = None,
        data: Path | None = None,
        policy: str = "",
        engine: str = "plain",
        cold: bool = False,
    ) -> None:
        """Start a site's agent, with a kit that is issued for it unless one is given; a cold one is no copy.

        `policy` is TOML added to one that allows what these tests ask for.
        """
        if identity is None and name not in {entry.name for entry in self.authority.entries()}:
            self.authority.issue("site", name)
        file = self.folder / f"{name}.toml"
        lax = "max_steps = 1000\nmax_learning_rate = 0.01\nmax_passes = 1e9\nmin_rows = 1\n"
        file.write_text(f'data = ["{self.material}", "{self.folder}"]\n{lax}' + (policy or 'bases = ["any"]\n'))
        enrolled = len(self.events(name, "enrolled"))
        self.start(
            name,
            *("site", "join", self.address, "--identity", str(identity or self.folder / "pki" / name)),
            *("--policy", str(file)),
            *("--data", str(data or self.material / f"{name}.jsonl"), "--work", str(self.folder / "work" / name)),
            *("--engine", engine, "--format", "json"),
            warm=engine == "plain" and not cold,
        )
        self.expect(name, "enrolled", count=enrolled + 1)

    def have(self, *names: str) -> None:
        """Join the sites that have not joined; a run of theirs names them, as others may be there too."""
        for name in names:
            if name not in self._children:
                self.join(name)

    def ended(self, name: str) -> int:
        """Wait for a process to end by itself; return its exit code."""
        return self._children[name].wait(timeout=DEADLINE_S)

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        self._children[name].send_signal(signal.SIGKILL)
        self._children[name].wait()

    def tree(self, name: str) -> list[psutil.Process]:
        """A process and all that descend from it."""
        process = psutil.Process(self._children[name].pid)
        return [process, *process.children(recursive=True)]

    def stop(self) -> None:
        """End what runs, politely first."""
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def connect(self, kit: Path | None = None) -> Session:
        """Open the coordinator with a kit, the owner's unless another is given: an owner may name any path."""
        opened = self._machine.open if self._machine else str
        return connect(",".join(map(opened, self.address.split(","))), identity=kit or self.owner, patience_s=60)

    def spec(self, **changes: Any) -> RunSpec:
        """A short run on the tiny model."""
        fields: dict[str, Any] = {
            "model": str(self.material / "model"),
            "builders": (Choice(name="crash", settings={"keep": 5}),),
            "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
            "method": Choice(name="lora", settings={"rank": 4, "alpha": 8.0}),
            "training": TrainingSpec(steps=4, learning_rate=0.01, max_length=32, seed=3),
            "public": str(self.material / "public.jsonl"),
        }
        return RunSpec(**{**fields, **changes})


class Rogue:
    """A site that speaks the protocol by hand."""

    def __init__(self, federation: Any, name: str, *, kit: Path | None = None) -> None:
        self.kit = kit or federation.authority.issue("site", name)
        self.name = name
        self.channel = Channel(federation.address, Identity.load(self.kit), patience_s=5)
        self.fleet: Any = fleet_pb2_grpc.FleetStub(self.channel.grpc)  # type: ignore[no-untyped-call]
        self.folder, self._spec = federation.folder, federation.spec
        self.channel.call(self.fleet.Enrol, pb.EnrolRequest(version="0", examples=1))

    def submit(self, session: Session, **changes: Any) -> Run:
        """Submit a run for this site alone."""
        return session.submit(self._spec(sites=(self.name,), **changes))

    def pull(self) -> TaskSpec:
        reply = self.channel.call(self.fleet.PullTask, pb.PullTaskRequest(wait_s=60), timeout_s=90)
        verify(reply.task, reply.signature, self.kit / "owner.pub", purpose="task")
        return from_json(TaskSpec, reply.task, where="task")

    def broadcast(self, task: TaskSpec) -> dict[str, torch.Tensor]:
        path = self.folder / f"{self.name}-broadcast"
        self.channel.download(self.fleet.Download, task.adapter, path)
        return tensors.load(path)

    def header(self, task: TaskSpec, path: Path, *, digest: str = "", examples: int = 1) -> pb.UploadHeader:
        told = UpdateMetrics(examples=examples, tokens=1, loss=1.0, engine="none")
        key = pb.TaskKey(run=task.run, round=task.round, attempt=task.attempt)
        size = path.stat().st_size
        return pb.UploadHeader(key=key, digest=digest or digest_file(path), size=size, metrics=to_json(told).decode())

    def save(self, task: TaskSpec, update: dict[str, torch.Tensor], **origin: str) -> Path:
        path = self.folder / f"{self.name}-update"
        told = {"broadcast": task.adapter, "method_hash": task.method_hash} | origin
        tensors.save(path, update, metadata={"offsite": json.dumps(told)})
        return path

    def upload(self, task: TaskSpec, update: dict[str, torch.Tensor], *, digest: str = "", examples: int = 1) -> None:
        path = self.save(task, update)
        self.channel.upload(self.fleet, self.header(task, path, digest=digest, examples=examples), path)


def write_material(folder: Path) -> Path:
    """Fill a folder with `model/` (a random Llama of 6 layers), sites' data, held-out data and public text."""
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "?", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(vocab_size=len(words), num_hidden_layers=6, **shape, **special)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for seed, name in enumerate(["hospital", "bank", "held-out", "public"]):
        draw = random.Random(seed)
        rows = []
        for _ in range(30):
            start = draw.randrange(60)
            prompt, completion = WORDS[start : start + 5], WORDS[start + 5 : start + 11]
            text = {"text": " ".join(prompt + completion)}
            rows.append(text if name == "public" else {"prompt": " ".join(prompt), "completion": " ".join(completion)})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and texts."""
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def wait() -> Callable[[Callable[[], Any], str], Any]:
    """The question asked again and again."""
    return wait_until


@contextmanager
def federated(folder: Path, material: Path, **options: Any) -> Iterator[Federation]:
    made = Federation(folder, material, **options)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """What the processes of federations are copies of."""
    made = Warm()
    yield made
    made.close()


@pytest.fixture(scope="session")
def federations(material: Path, warm: Warm) -> Callable[..., AbstractContextManager[Federation]]:
    """A maker of federations, each in a folder and, by keyword, a machine and an environment of its own.

    A path of Python's own is read when a process starts: those have no copies, nor have those in a machine.
    """

    def make(folder: Path, **options: Any) -> AbstractContextManager[Federation]:
        cold = {"machine", "PYTHONPATH"} & options.keys()
        return federated(folder, material, warm=None if cold else warm, **options)

    return make


@contextmanager
def alone(*names: str) -> Iterator[list[Machine]]:
    """Make machines, or skip a test where the system lets us make none."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(machines(*names))
        except OSError as reason:
            pytest.skip(f"machines need root's rights to namespaces here: {reason}")
        yield made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster of two machines that share no folder, for tests that leave both as they were."""
    with alone("head", "worker") as made:
        cluster = Cluster(made, wait_until)
        for machine in made:
            cluster.start(machine)
        yield cluster


@pytest.fixture
def federation(tmp_path: Path, federations: Any) -> Iterator[Federation]:
    """A federation with nothing started."""
    with federations(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def coordinated(tmp_path_factory: pytest.TempPathFactory, federations: Any) -> Iterator[Federation]:
    """A federation whose coordinator runs, shared by all tests that end nothing of it but what they started."""
    telemetry = {"OFFSITE_METRICS": "127.0.0.1:0", "OFFSITE_LOG_FORMAT": "json"}
    with federations(tmp_path_factory.mktemp("coordinated"), **telemetry) as made:
        made.coordinate()
        with made.connect() as session:  # it is patient while the coordinator imports what judges runs
            session.submit(made.spec(sites=("nobody",))).cancel()
        yield made


@pytest.fixture
def rogue(coordinated: Federation) -> Iterator[Rogue]:
    """A hostile site of the shared federation, under a name of its own."""
    made = Rogue(coordinated, f"rogue-{len(coordinated.authority.entries())}")
    yield made
    made.channel.close()
