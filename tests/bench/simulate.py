"""How fast virtual sites are simulated, and in how much memory, beside pfl-research and Flower on the same machine.

    python tests/bench/simulate.py [--pfl PYTHON] [--flower PYTHON] [--part rate|step|real|memory]

Each `PYTHON` is the interpreter of an environment with the peer: pip install pfl==0.6.0 numpy, and
pip install 'flwr[simulation]==1.42.0' psutil; one that is left out is not compared with. What is simulated are LoRA
runs on small random models: by the mean of each factor, which is what the peers do with their arrays, and by the
default strategy, which averages products exactly. The parts:

rate     trivial training (a constant is added) and updates of 40 kB: sites a second, 2,000 and 10,000 of them
step     updates of 1 MB, and a step that waits for 10 ms, as for an accelerator
real     real training, against a bare loop of torch over the same steps on the same model
memory   of all processes together, and of the largest, in five rounds of 10 and of 1,000 sites with updates of 1 MB

A rate is of a round from its begin to the begin of the next, so all that a round costs is in it; the first, in which
workers begin, is not counted, and of the others the fastest is shown. Each figure is of a process of its own, peers in
the same run.
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
EXACT, MEAN = "low-rank", "factor-mean"
STEP_S = float(os.environ.get("BENCH_STEP_S", "0"))


def moving(visit: Any) -> Any:
    """Stand for training: move each value by a constant, after a pause."""
    from offsite.protos.spec import UpdateMetrics

    if STEP_S:
        time.sleep(STEP_S)
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


def spec(folder: Path, case: dict[str, Any], *, rounds: int, strategy: str = EXACT) -> Any:
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
        strategy=Choice(name=strategy),
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
            spec(folder, CASES[asked["case"]], rounds=asked["rounds"], strategy=asked["strategy"]),
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
    largest, all_ = peak
    return {
        **{"users_per_s": rates, "largest_mb": largest, "memory_mb": all_},
        **{"folding_s": folds, "update_kb": max(sizes) / 1000},
    }


def watch(peak: list[int]) -> None:
    """Note the most memory that one of all processes has resident, and all together, counting what they share once."""
    process = psutil.Process()
    while True:
        largest, together = 0, 0
        for one in [process, *process.children(recursive=True)]:
            try:
                memory = one.memory_full_info()
            except psutil.Error:
                continue
            largest, together = max(largest, memory.rss), together + memory.pss
        peak[0], peak[1] = max(peak[0], largest >> 20), max(peak[1], together >> 20)
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


def peer(name: str, python: str, case: str, *, users: int, step_s: float = 0.0) -> dict[str, Any]:
    """Have a peer do the same with arrays of the same shapes."""
    one = CASES[case]
    layers, hidden, rank = 2 * one["ends"], one["hidden"], one["rank"]
    shapes = [[rank, hidden], [hidden, rank]] * layers * len(one["modules"])
    asked = json.dumps({"shapes": shapes, "users": users, "rounds": 3, "step_s": step_s})
    command = [python, str(Path(__file__).parent / f"peer_{name}.py"), asked]
    environment = os.environ | {"PYTHONPATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def show(what: str, result: dict[str, Any]) -> float:
    """Print a line; return the best rate."""
    rate = max(result["users_per_s"])
    memory = f"{result['memory_mb']:6,.0f} MB" if "memory_mb" in result else ""
    fold = f", {min(result['folding_s']):.2f} s of a round for the fold" if "folding_s" in result else ""
    print(f"  {what:42} {rate:8,.0f} sites a second  {memory}{fold}", flush=True)
    return rate


def beside(peers: dict[str, str], case_: str, *, users: int, few: int, step_s: float = 0.0) -> None:
    """Show what sites cost here and at the peers, of which Flower is asked for few."""
    rates = {
        strategy: show(
            f"offsite, {strategy}, {users:,} sites",
            apart("ours", case(case_, users=users, rounds=4, strategy=strategy), step_s=step_s),
        )
        for strategy in (MEAN, EXACT)
    }
    for name, python in peers.items():
        theirs = few if name == "flower" else users
        rate = show(f"{name}, {theirs:,} users", peer(name, python, case_, users=theirs, step_s=step_s))
        print(*(f"  {strategy}: {mine / rate:.2f} times {name}'s" for strategy, mine in rates.items()), sep="")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pfl", default="", metavar="PYTHON")
    parser.add_argument("--flower", default="", metavar="PYTHON")
    parser.add_argument("--part", choices=["rate", "step", "real", "memory"], action="append")
    parser.add_argument("--only", nargs=2, metavar=("HOW", "CASE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps({"ours": ours, "bare": bare}[asked.only[0]](json.loads(asked.only[1]))))
        return
    parts = asked.part or ["rate", "step", "real", "memory"]
    peers = {name: python for name, python in (("pfl", asked.pfl), ("flower", asked.flower)) if python}
    if "rate" in parts:
        print("trivial training, updates of 40 kB")
        for users in (2000, 10_000):
            beside(peers, "40 kB", users=users, few=200)
            peers = {name: python for name, python in peers.items() if name != "flower"}  # as fast with more
    if "step" in parts:
        print("updates of 1 MB, a step of 10 ms")
        beside(peers | ({"flower": asked.flower} if asked.flower else {}), "1 MB", users=600, few=100, step_s=0.01)
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
        for what, key in (("all processes together", "memory_mb"), ("the largest process", "largest_mb")):
            print(f"  {many[key] - few[key]:.0f} MB more in {what}")


def case(
    name: str, *, users: int, rounds: int, real: bool = False, workers: int | None = None, strategy: str = EXACT
) -> dict[str, Any]:
    """Return what is asked of a process."""
    return {
        **{"case": name, "users": users, "rounds": rounds},
        **{"real": real, "workers": workers, "strategy": strategy},
    }


if __name__ == "__main__":
    main()
