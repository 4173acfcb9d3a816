"""A tiny emulator on disk, the first broadcast for it, and jobs that train it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.client.site.launch import Trainer, fork_server, launch
from offsite.client.site.policy import Policy
from offsite.emulator import bundle, methods
from offsite.emulator.outline import Outline
from offsite.protos import tensors
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import to_json
from offsite.protos.processes.forks import ForkServer
from offsite.protos.spec import BaseRef, Choice, LocalTraining, Manifest, TaskSpec

OUTLINE = Outline(layers=(0, 2, 3, 5), trainable=(0, 5))
METHOD = Choice(name="lora", settings={"rank": 4, "alpha": 8.0})
WORDS = 60
DIGEST = "sha256:" + "0" * 64
LAX: dict[str, Any] = {"bases": ("any",), "data": ("/",), "min_rows": 1, "max_passes": 1e9, "min_steps": 1}

Jobs = Callable[..., TrainerJob]
Launch = Callable[[TrainerJob, Path], Trainer]


def emulator() -> torch.nn.Module:
    """A random model of the outline's depth."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(OUTLINE.layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def site_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle/`, `adapter.safetensors`, `secret` and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("site")
    words = {word: index for index, word in enumerate(["?", "<s>", "</s>", "<pad>", *(f"w{n}" for n in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    )
    model = emulator()
    bundle.save(model, tokenizer, folder / "bundle", outline=OUTLINE)
    method = methods.make(METHOD.name, METHOD.settings)
    tensors.save(folder / "adapter.safetensors", method.start(model, OUTLINE.places, seed=0))
    drawn = torch.randint(0, WORDS, (22, 30), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [
        {
            "prompt": " ".join(f"w{n}" for n in row[: 2 + at % 5]),
            "completion": " ".join(f"w{n}" for n in row[7 : 9 + at]),
        }
        for at, row in enumerate(drawn)
    ]
    (folder / "secret").write_bytes(bytes(range(32)))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def job(site_files: Path, tmp_path: Path) -> Jobs:
    """A maker of jobs; engine settings by keyword, training settings and bounds of the policy as dicts."""

    def make(
        *,
        training: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
        data: Path | None = None,
        upload: tuple[Choice, ...] = (),
        secret: Path | None = None,
        **engine: Any,
    ) -> TrainerJob:
        settings = {"steps": 6, "batch_size": 4, "learning_rate": 5e-3, "max_length": 32} | (training or {})
        manifest = Manifest(
            base=BaseRef(name="tiny", digest=DIGEST, layers=6, parameters=1),
            builders=(Choice(name="uniform"),),
            layers=OUTLINE.layers,
            trainable=OUTLINE.trainable,
            shared=OUTLINE.shared,
            parameters=1,
            verbatim=1,
            lossy=0,
            files=(),
        )
        task = TaskSpec(
            run="run-1",
            round=0,
            rounds=1,
            site="clinic",
            attempt=0,
            base=DIGEST,
            manifest=digest_bytes(to_json(manifest)),
            manifest_size=1,
            adapter=DIGEST,
            adapter_size=1,
            update_size=1,
            method=METHOD,
            method_hash=DIGEST,
            training=LocalTraining(**settings),
            upload=upload,
        )
        return TrainerJob(
            bundle=str(site_files / "bundle"),
            manifest=manifest,
            adapter=str(site_files / "adapter.safetensors"),
            data=str(data or site_files / "data.jsonl"),
            policy=Policy(**LAX | (policy or {})),
            task=task,
            engine=EngineSpec(**{"name": "plain", "device": "cpu", "threads": 1} | engine),
            secret=str(secret or site_files / "secret"),
            out=str(tmp_path / "out"),
        )

    return make


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """What launches jobs, those that import the same from one server."""
    servers: dict[EngineSpec, ForkServer] = {}

    def start(job: TrainerJob, folder: Path) -> Trainer:
        engine = replace(job.engine, zero_stage=2, offload=False)
        if engine not in servers:
            servers[engine] = fork_server(engine, tmp_path_factory.mktemp("server") / "log")
        return launch(job, folder, servers[engine])

    yield start
    for server in servers.values():
        server.close()
