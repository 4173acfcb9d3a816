"""How fast requests for many adapters of one base are answered together, beside swapping the adapters one by one.

    python tests/bench/serving.py [--model smollm2-135m-instruct] [--adapters 1,10,100] [--requests 100] [--tokens 8]

As many requests are spread evenly over the adapters, LoRA on all maps, which lie on disk. `mixed` answers them in the
order in which they come, all adapters in one pass. The yardsticks have them sorted by adapter: `swapped` is the same
engine with one slot, so that no two adapters share a pass, and `peft` attaches each adapter with peft, has
transformers' `generate` answer its requests, as many at once as ours, and takes it off. A JSON line for each number of
adapters has the tokens a second of all three, measured after each other in one process, and `mixed` beside the others.
The seconds are the processor's, with one thread, so that what else the machine does counts as little as may be.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from offsite.emulator.methods import make
from offsite.emulator.plug import load
from offsite.emulator.serving.engine import Engine, Request
from offsite.emulator.serving.slots import Slots
from offsite.emulator.zoo import cache_folder, load_base, locate

RANK, PROMPT = 8, 16
Asked = Sequence[tuple[int, list[int]]]  # an adapter's number, and a prompt


def publish(folder: Path, base: Any, count: int) -> list[Path]:
    """Write adapters of small random values."""
    method, places = make("lora", {"rank": RANK}), {at: at for at in range(base.config.num_hidden_layers)}
    start = method.start(base, places, seed=0)
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        adapter = {key: 0.02 * torch.randn(one.shape, generator=draw) for key, one in start.items()}
        method.export(folder / str(number), adapter, base=base, base_name="base")
    return [folder / str(number) for number in range(count)]


def ours(model: Any, folders: Sequence[Path], asked: Asked, *, tokens: int, rows: int, swap: bool) -> None:
    """Answer with the engine; with one slot, where adapters are to be swapped."""
    slots = Slots(model, folders, size=8 << 30)
    slots.count = 1 if swap else slots.count
    engine = Engine(model, slots, ends=frozenset(), rows=rows, waiting=len(asked))
    pieces: list[Any] = []
    for adapter, prompt in sorted(asked) if swap else asked:
        engine.submit(Request(prompt, (folders[adapter],), tokens, pieces.append))
    while engine.step():
        pass
    assert len(pieces) == tokens * len(asked)


def peft(model: Any, folders: Sequence[Path], asked: Asked, *, tokens: int, rows: int) -> None:
    """Answer by adapter with transformers and peft."""
    how = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    for number, folder in enumerate(folders):
        own = [prompt for adapter, prompt in asked if adapter == number]
        attached: Any = load(model, folder)
        for at in range(0, len(own), rows):
            ids = torch.tensor(own[at : at + rows])
            attached.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
        model = attached.unload()


def seconds(work: Callable[[], None]) -> float:
    """Return the processor's time for something."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    """Measure, and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapters", default="1,10,100")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    place, counts = locate(args.model, cache=cache_folder()), [int(one) for one in args.adapters.split(",")]

    def fresh() -> Any:
        return load_base(place, torch.float32)[0]

    with tempfile.TemporaryDirectory() as scratch:
        folders = publish(Path(scratch), fresh(), max(counts))
        draw = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 1000, (args.requests, PROMPT), generator=draw).tolist()
        how: dict[str, Any] = {"tokens": args.tokens, "rows": args.rows}
        for count in counts:
            asked = [(number % count, prompt) for number, prompt in enumerate(prompts)]
            some, total = folders[:count], args.tokens * args.requests
            ways = {
                "mixed": partial(ours, fresh(), some, asked, swap=False, **how),
                "swapped": partial(ours, fresh(), some, asked, swap=True, **how),
                "peft": partial(peft, fresh(), some, asked, **how),
            }
            rates = {name: total / seconds(way) for name, way in ways.items()}
            beside = {f"beside_{name}": rates["mixed"] / rates[name] for name in ("swapped", "peft")}
            print(json.dumps({"adapters": count} | {n: round(v, 2) for n, v in (rates | beside).items()}), flush=True)


if __name__ == "__main__":
    main()
