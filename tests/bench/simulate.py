"""How fast virtual sites are simulated, and in how much memory, beside pfl-research on the same machine.

    python tests/bench/simulate.py [--pfl PYTHON] [--part rate|step|real|memory]

`PYTHON` is the interpreter of an environment with pfl 0.6 (pip install pfl==0.6.0 numpy); without it nothing is
compared. What is simulated are LoRA runs on small random models, with the default strategy, which averages products
exactly. The parts:

rate     trivial training (a constant is added) and updates of 40 kB: sites a second, 2,000 and 10,000 of them
step     updates of 1 MB, and a step that waits for 10 ms, as for an accelerator
real     real training, against a bare loop of torch over the same steps on the same model
memory   of the process that folds, in five rounds of 10 and of 1,000 sites with updates of 1 MB

A rate is of a round from its begin to the begin of the next, so all that a round costs is in it; the first, in which
workers begin, is not counted. Each figure is of a process of its own, peers in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

METRICS = {"examples": 10, "tokens": 10, "loss": 1.0, "engine": "none"}
CASES: dict[str, dict[str, Any]] = {
    "40 kB": {"hidden": 320, "rank": 8, "modules": ["q_proj"], "ends": 1},  # 4 tensors
    "1 MB": {"hidden": 256, "rank": 32, "modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "ends": 2},  # 32 tensors
    "real": {"hidden": 128, "rank": 8, "modules": "all-linear", "ends": 2},
}
STEPS, BATCH, LENGTH = 20, 4, 64


def moving(visit: Any) -> Any:
    """Stand for training: move each value by a constant, after a pause."""
    from offsite.protos.spec import UpdateMetrics

    if pause := float(os.environ.get("BENCH_STEP_S", "0")):
        time.sleep(pause)
    return {name: tensor + 1e-3 for name, tensor in visit.broadcast.items()}, UpdateMetrics(**METRICS)


def material(folder: Path, case: dict[str, Any]) -> None:
    """Write a random Llama with two layers more than train, and rows of text."""
    import random

    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "?", *(f"w{n}" for n in range(500))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": len(words), "num_hidden_layers": 2 * case["ends"] + 2},
        **{"hidden_size": case["hidden"], "intermediate_size": 2 * case["hidden"]},
        **{"num_attention_heads": 4, "num_key_value_heads": 4},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [" ".join(f"w{draw.randrange(500)}" for _ in range(LENGTH - 2)) for _ in range(400)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def spec(folder: Path, case: dict[str, Any], *, rounds: int) -> Any:
    """Return the run of a case; its emulator is the whole model."""
    from offsite.protos.spec import Choice, RunSpec, TrainingSpec

    settings = {"rank": case["rank"], "modules": case["modules"]}
    return RunSpec(
        model=str(folder / "model"),
        builders=(Choice(name="whole"),),
        trainable=Choice(name="ends", settings={"bottom": case["ends"], "top": case["ends"]}),
        method=Choice(name="lora", settings=settings),
        training=TrainingSpec(steps=STEPS, batch_size=BATCH, learning_rate=1e-4, max_length=LENGTH),
        rounds=rounds,
        max_update_norm=1e6,
    )


def ours(asked: dict[str, Any]) -> dict[str, Any]:
    """Simulate a case here."""
    from offsite.client.site.policy import Policy
    from offsite.deploy import simulate
    from offsite.protos.recipes import parse_one

    peak = [0, 0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        material(folder, CASES[asked["case"]])
        policy = Policy(bases=("any",), data=(str(folder),), max_passes=1e9, min_rows=1, suspicious="warn")
        threading.Thread(target=watch, args=(peak,), daemon=True).start()
        more = {} if asked["real"] else {"train": "simulate:moving"}
        result = simulate(
            spec(folder, CASES[asked["case"]], rounds=asked["rounds"]),
            data=folder / "rows.jsonl",
            out=folder / "out",
            sites=asked["users"],
            partition=parse_one("iid(rows=80)"),
            policy=policy,
            workers=asked.get("workers"),
            **more,
        )
    begins = [span["start"] for span in result.report["spans"] if span["kind"] == "training"]
    folds = [span["end"] - span["start"] for span in result.report["spans"] if span["kind"] == "aggregation"]
    rates = [asked["users"] / (after - before) for before, after in zip(begins, begins[1:], strict=False)]
    sizes = {one["bytes_up"] for one in next(iter(result.report["rounds"]))["sites"].values()}
    own, all_ = peak
    return {"users_per_s": rates, "memory_mb": own, "all_mb": all_, "folding_s": folds, "update_kb": max(sizes) / 1000}


def watch(peak: list[int]) -> None:
    """Note the most memory of this process, and of it with all that it started, counting what they share once."""
    process = psutil.Process()
    while True:
        family = [process, *process.children(recursive=True)]
        with_all = 0
        for one in family:
            try:
                with_all += one.memory_full_info().pss
            except psutil.Error:
                continue
        peak[0] = max(peak[0], process.memory_info().rss >> 20)
        peak[1] = max(peak[1], with_all >> 20)
        time.sleep(0.25)


def bare(asked: dict[str, Any]) -> dict[str, Any]:
    """Take the steps of so many sites in one loop of torch, with nothing around it; return sites a second."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    case = CASES[asked["case"]]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        material(folder, case)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        rows = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    depth, ends = len(model.model.layers), case["ends"]
    train = [*range(ends), *range(depth - ends, depth)]
    config = LoraConfig(r=case["rank"], target_modules=targets, layers_to_transform=train)
    model = get_peft_model(model, config).train()
    ids = torch.tensor([[1, *tokenizer(row, add_special_tokens=False).input_ids, 2] for row in rows[:80]])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def site() -> None:
        adamw = torch.optim.AdamW(trained, lr=1e-4)
        for step in range(STEPS):
            batch = ids[step * BATCH % 80 :][:BATCH]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            adamw.step()
            adamw.zero_grad()
            float(loss)

    site()
    begin = time.perf_counter()
    for _ in range(asked["users"]):
        site()
    return {"users_per_s": [asked["users"] / (time.perf_counter() - begin)]}


def apart(how: str, asked: dict[str, Any], *, step_s: float = 0.0) -> dict[str, Any]:
    """Do one thing in a process of its own."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "BENCH_STEP_S": str(step_s)}
    command = [sys.executable, __file__, "--only", how, json.dumps(asked)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def pfl(python: str, case: str, *, users: int, rounds: int, step_s: float = 0.0) -> dict[str, Any]:
    """Have pfl-research do the same with arrays of the same shapes."""
    one = CASES[case]
    layers, hidden, rank = 2 * one["ends"], one["hidden"], one["rank"]
    shapes = [[rank, hidden], [hidden, rank]] * layers * len(one["modules"])
    asked = json.dumps({"shapes": shapes, "users": users, "rounds": rounds, "step_s": step_s})
    command = [python, str(Path(__file__).parent / "peer_pfl.py"), asked]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"PYTHONPATH": ""})
    return dict(json.loads(result.stdout.splitlines()[-1]))


def show(what: str, result: dict[str, Any]) -> float:
    """Print a line; return the best rate."""
    rate = max(result["users_per_s"])
    memory = f"{result['memory_mb']:.0f} MB" if "memory_mb" in result else ""
    more = f", {result['all_mb']} MB with its workers" if "all_mb" in result else ""
    fold = f", folding {min(result['folding_s']):.2f} s a round" if "folding_s" in result else ""
    print(f"  {what:42} {rate:8,.0f} sites a second  {memory}{more}{fold}", flush=True)
    return rate


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pfl", default="", metavar="PYTHON")
    parser.add_argument("--part", choices=["rate", "step", "real", "memory"], action="append")
    parser.add_argument("--only", nargs=2, metavar=("HOW", "CASE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps({"ours": ours, "bare": bare}[asked.only[0]](json.loads(asked.only[1]))))
        return
    parts = asked.part or ["rate", "step", "real", "memory"]
    if "rate" in parts:
        print("trivial training, updates of 40 kB")
        for users in (2000, 10_000):
            mine = show(f"offsite, {users:,} sites", apart("ours", case("40 kB", users=users, rounds=3)))
            if asked.pfl:
                its = show(f"pfl, {users:,} users", pfl(asked.pfl, "40 kB", users=users, rounds=2))
                print(f"  {mine / its:.2f} times pfl's")
    if "step" in parts:
        print("updates of 1 MB, a step of 10 ms")
        mine = show("offsite, 600 sites", apart("ours", case("1 MB", users=600, rounds=3), step_s=0.01))
        if asked.pfl:
            its = show("pfl, 600 users", pfl(asked.pfl, "1 MB", users=600, rounds=2, step_s=0.01))
            print(f"  {mine / its:.2f} times pfl's")
    if "real" in parts:
        print(f"real training of {STEPS} steps, one worker")
        mine = show("offsite, 30 sites", apart("ours", case("real", users=30, rounds=3, real=True, workers=1)))
        its = show("a bare loop over the same steps", apart("bare", {"case": "real", "users": 30}))
        print(f"  {mine / its:.2f} of the bare loop's")
    if "memory" in parts:
        print("five rounds with updates of 1 MB")
        few, many = (apart("ours", case("1 MB", users=users, rounds=5)) for users in (10, 1000))
        show("offsite, 10 sites", few)
        show("offsite, 1,000 sites", many)
        print(f"  {many['memory_mb'] - few['memory_mb']:.0f} MB more in the process that folds")


def case(name: str, *, users: int, rounds: int, real: bool = False, workers: int | None = None) -> dict[str, Any]:
    """Return what is asked of a process."""
    return {"case": name, "users": users, "rounds": rounds, "real": real, "workers": workers}


if __name__ == "__main__":
    main()
