"""Good inputs with a few bytes changed, many a second: each is read, or refused by an error of the project's own.

Beside the hypothesis tests, which know what a value means, this knows nothing and is fast.

OFFSITE_FUZZ=1000000 pytest -n 0 -s tests/fuzz/test_mutations.py
"""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offsite.client.site.policy import Policy
from offsite.emulator.modality import read
from offsite.kernels.schema import Field, Rule, Schema
from offsite.protos import addresses, recipes, tensors
from offsite.protos.assignments import assign
from offsite.protos.documents import from_json, from_toml, parse, to_json
from offsite.protos.errors import OffsiteError
from offsite.protos.spec import RunSpec

from .hostile import as_json, told
from .test_fuzz_documents import GOOD

COUNT = int(os.environ.get("OFFSITE_FUZZ", "4000"))  # inputs in all
SEED = int(os.environ.get("OFFSITE_FUZZ_SEED", "0"))
DOCS = Path(__file__).parents[2] / "docs"
PIECES = [
    b"",
    b"0",
    b"-",
    b"9" * 30,
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b'"',
    b"\\ud800",
    b"[",
    b"{",
    b"]",
    b"}",
    b",",
]
PIECES += [
    b"\x00",
    b"\xff",
    b"\xe2\x80\xae",
    b"\x1b[2J",
    b"\n",
    b"=",
    b":",
    b"[" * 200,
    b"a" * 5000,
    b"#",
    b"'''",
    b"(",
]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ROWS = b"\n".join(map(as_json, [{"prompt": "a", "completion": "b"}, CHAT, {"instruction": "a", "output": "b"}]))
Target = Callable[[bytes], object]


def mutated(good: bytes, draw: random.Random) -> bytes:
    """Replace, insert, repeat or cut up to four pieces."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(good) + 1)
        stop = min(len(good), start + draw.choice([0, 0, 1, 1, 2, 8, 40]))
        piece = draw.choice([*PIECES, bytes([draw.randrange(256)]), good[start:stop] * 2])
        good = good[:start] + piece + good[stop:]
    return good


def files(folder: Path) -> dict[str, tuple[bytes, Target]]:
    """What is read from files, each by its name."""
    tensors.save(folder / "good", {"0.q.A": torch.ones(2, 3), "0.q.B": torch.ones(4, 2)})
    schema: Schema = {"0.q.A": Field("F32", (2, 3), Rule.MEAN), "0.q.B": Field("F32", (4, 2), Rule.MEAN)}

    def at(name: str, take: Callable[[Path], object]) -> Target:
        def target(data: bytes) -> object:
            (folder / name).write_bytes(data)
            return take(folder / name)

        return target

    return {
        "policy.toml": ((DOCS / "policy.toml").read_bytes(), at("policy.toml", lambda path: from_toml(Policy, path))),
        "run.toml": ((DOCS / "run.toml").read_bytes(), at("run.toml", lambda path: from_toml(RunSpec, path))),
        "rows.jsonl": (ROWS, at("rows.jsonl", read)),
        "rows.json": (b"[" + ROWS.replace(b"\n", b",") + b"]", at("rows.json", read)),
        "rows.csv": (b'prompt,completion\na,b\n"c","d\ne"\n', at("rows.csv", read)),
        "rows.txt": (b"a b c\n\nd e f\n", at("rows.txt", read)),
        "update": ((folder / "good").read_bytes(), at("update", lambda p: tensors.check(p, schema, what="update"))),
    }


def texts() -> dict[str, tuple[bytes, Target]]:
    """What comes as text, from a command line or the wire."""

    def settings(data: bytes) -> object:
        return parse(RunSpec, assign(data.decode(errors="surrogateescape").splitlines(), {}, RunSpec), where="run")

    found: dict[str, tuple[bytes, Target]] = {
        "recipe": (
            b"crash(keep=20|24,sharing=auto)+quantised(format=nf4)",
            lambda data: recipes.expand(data.decode(errors="replace")),
        ),
        "address": (b"tuning.example.org:8443", lambda data: addresses.parse(data.decode(errors="replace"))),
        "settings": (b"model=m\ntraining.steps=4\nmethod.settings.rank=2", settings),
    }
    for document, value in GOOD:
        found[document.__name__] = (
            as_json(value),
            lambda data, document=document: to_json(from_json(document, data, where="it")),
        )  # type: ignore[misc]
    return found


def test_good_inputs_with_a_few_bytes_changed(tmp_path: Path) -> None:
    targets = texts() | files(tmp_path)
    draw, slowest = random.Random(SEED), (0.0, "")
    for name, (good, target) in targets.items():
        target(good)
        for _ in range(COUNT // len(targets)):
            data = mutated(good, draw)
            start = time.perf_counter()
            try:
                target(data)
            except (OffsiteError, ValueError) as error:
                if isinstance(error, ValueError) and not name.startswith("rows"):
                    pytest.fail(f"{name}: {data[:300]!r}: {error!r}")
                told(error)
            except Exception as error:
                pytest.fail(f"{name}: {data[:300]!r}: {error!r}")
            slowest = max(slowest, (time.perf_counter() - start, name))
    print(f"{COUNT} inputs of {len(targets)} kinds; the slowest took {slowest[0]:.2f} s ({slowest[1]})")
