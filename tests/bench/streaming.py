"""How much memory `offsite emulator build` takes for a base that is read layer by layer.

    python tests/bench/streaming.py FOLDER [--layers 40] [--examples 16]

It writes a Llama of random weights into FOLDER (3.2 billion parameters, 6.4 GB) unless it is there, builds a CRaSh
emulator of it in a process of its own, and prints the most memory that process had resident beside what the base and
its parts weigh. FOLDER is left, so that the next run need not write it again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from offsite.emulator import zoo
from offsite.emulator.anatomy.structure import find
from offsite.emulator.checkpoint import skeleton

WIDTH = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 4}


def write_base(folder: Path, *, layers: int) -> None:
    """Write a model folder of random bf16 weights, one layer in memory at a time."""
    tokenizer = zoo.load_tokenizer(zoo.locate("smollm2-135m-instruct", cache=zoo.cache_folder()))
    config = LlamaConfig(**WIDTH, num_hidden_layers=layers, vocab_size=len(tokenizer), tie_word_embeddings=True)
    config.dtype = torch.bfloat16
    model = skeleton(config, dtype=torch.bfloat16)
    model.tie_weights()
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        inside = name.startswith(f"{find(model).path}.")
        groups.setdefault(name.split(".")[2] if inside else "rest", {})[name] = parameter.shape
    for group, shapes in groups.items():
        drawn = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (0.02 * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(drawn, folder / f"model-{group}.safetensors", metadata={"format": "pt"})
    index = {name: f"model-{group}.safetensors" for group, shapes in groups.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    """Write the base if need be, build the emulator, and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--examples", type=int, default=16)
    asked = parser.parse_args()
    base, out = asked.folder / f"base-{asked.layers}", asked.folder / "emulator"
    if not base.exists():
        write_base(base, layers=asked.layers)
    shutil.rmtree(out, ignore_errors=True)
    text = " ".join(str(number) for number in range(120))
    public = asked.folder / "public.jsonl"
    public.write_text("".join(json.dumps({"text": f"{at} {text}"}) + "\n" for at in range(asked.examples)))
    command = [sys.executable, "-m", "offsite.client", "emulator", "build", str(base), "--stream", "--out", str(out)]
    started = time.monotonic()
    child = subprocess.Popen([*command, "--public", str(public)])
    _, status, used = os.wait4(child.pid, 0)
    sizes = {path.name: path.stat().st_size for path in base.glob("*.safetensors")}
    rest = sizes.pop("model-rest.safetensors")
    told = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "base_gb": (sum(sizes.values()) + rest) / 1e9,
        "largest_layer_gb": max(sizes.values()) / 1e9,
        "embeddings_gb": rest / 1e9,
        "emulator_gb": sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e9,
        "peak_resident_gb": used.ru_maxrss * 1024 / 1e9,
        "seconds": time.monotonic() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }
    print(json.dumps({name: round(value, 2) for name, value in told.items()}))


if __name__ == "__main__":
    main()
