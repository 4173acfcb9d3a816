"""Whole runs over real sockets, certificates and processes."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from offsite.client import Choice
from offsite.coordinator.runs.forking import address
from offsite.emulator.batches import training_batches
from offsite.emulator.modality import encode, read


def plain_local_training(model_folder: Path, data: Path, spec: Any) -> dict[str, torch.Tensor]:
    """The same training written down without any of the product's method, engine or trainer."""
    from offsite.emulator.methods import make

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    start = make("lora", spec.method.settings).start(model, {0: 0, 5: 5}, seed=spec.training.seed)
    names = [key[:-2] for key in start if key.endswith(".A")]
    targets = [f"model.layers.{name}" for name in names]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8.0, target_modules=targets))
    live = dict(model.named_parameters())

    def parameter(name: str, factor: str) -> torch.nn.Parameter:
        return live[f"base_model.model.model.layers.{name}.lora_{factor}.default.weight"]

    with torch.no_grad():
        for name in names:
            for factor in "AB":
                parameter(name, factor).copy_(start[f"{name}.{factor}"])
    trained = [parameter(name, factor) for name in names for factor in "AB"]
    optimizer = torch.optim.AdamW(trained, lr=spec.training.learning_rate, weight_decay=0.0)
    encoded = encode(read(data), tokenizer, max_length=spec.training.max_length)
    steps = spec.training.steps
    model.train()
    for batch in training_batches(encoded, batch_size=4, steps=steps, first_step=0, seed=spec.training.seed):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, spec.training.gradient_clipping)
        optimizer.step()
    return {f"{name}.{factor}": parameter(name, factor).detach() for name in names for factor in "AB"}


def whole(federation: Any) -> Any:
    """A run of one site whose emulator is the model itself."""
    ends = Choice(name="ends", settings={"bottom": 1, "top": 1})
    return federation.spec(builders=(Choice(name="whole"),), trainable=ends, public="", sites=("hospital",))


def trained(federation: Any, folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (name, what a run gave, what plain local training gives)."""
    given = load_file(folder / "adapter" / "adapter_model.safetensors")
    data = federation.material / "hospital.jsonl"
    wanted = plain_local_training(federation.material / "model", data, whole(federation))
    assert len(given) == len(wanted)
    for key, tensor in wanted.items():
        name, _, factor = key.rpartition(".")
        yield key, given[f"base_model.model.model.layers.{name}.lora_{factor}.weight"], tensor


def test_one_site_and_one_round_is_plain_local_training_bit_for_bit(coordinated: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    coordinated.have("hospital")
    with coordinated.connect() as session:
        folder = session.submit(whole(coordinated)).result(tmp_path / "out")
    for key, given, wanted in trained(coordinated, folder):
        assert torch.equal(given, wanted), key


def test_two_sites_with_different_ranks_give_an_adapter_a_merged_model_and_a_report(
    coordinated: Any, tmp_path: Path
) -> None:
    federation = coordinated
    federation.have("hospital", "bank")
    exam = federation.material / "held-out.jsonl"
    own = tmp_path / "own.jsonl"  # text of the task that the owner has; attacks are not measured on it
    rows = (federation.material / "hospital.jsonl").read_text().splitlines()
    own.write_text("\n".join(row for row in rows if row not in exam.read_text()))
    spec = federation.spec(
        rounds=2,
        method=Choice(name="lora", settings={"rank": 4, "alpha": 8.0, "ranks": {"bank": 2}}),
        evaluation={"exam": str(exam)},
        attack_steps=4,
        attack_text=str(own),
        evaluate_every=1,
        merge=True,
        sites=("hospital", "bank"),
        min_sites=2,
    )
    with federation.connect() as session:
        earlier = {run.id for run in session.runs()}
        run = session.submit(spec, token="once")
        assert session.submit(spec, token="once").id == run.id, "a repeated submission makes no second run"
        kinds = [event.kind for event in run.watch()]
        folder = run.result(tmp_path / "out")
        assert {run.id for run in session.runs()} - earlier == {run.id}
        assert {s.name: s.examples for s in session.sites()}.items() >= {"hospital": 30, "bank": 30}.items()
    assert kinds[-1] == "completed" and kinds.count("update") == 4 and kinds.count("round") == 2

    report = run.report
    assert report["overall"]["plug_in"] < report["overall"]["base_zero_shot"]
    figures = {"base_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "base_tuned", "attack"}
    assert report["overall"].keys() == figures
    assert len(report["attacks"]) == 7 and report["protection"]["margin"] is not None
    assert report["overall"]["attack"] == report["attacks"][0]["overall"] < report["overall"]["emulator_zero_shot"]
    assert f"the strongest of 7 attacks ({report['attacks'][0]['name']})" in report["protection"]["reason"]
    assert report["protection"]["reason"].endswith("tuned on the owner's own text of the task, not the sites'")
    assert report["sites"]["exam"] == pytest.approx(report["overall"])
    assert report["rounds"][0]["figures"]["plug_in"] < report["overall"]["base_zero_shot"]
    assert report["rounds"][0]["sets"]["exam"] == report["rounds"][0]["figures"]["plug_in"]
    assert report["bytes"]["down"] > 0 < report["bytes"]["up"], "of what goes down a site may have kept some"
    assert report["seconds"]["total"] > report["seconds"]["training"] > 0
    assert {w["weight"] for w in report["rounds"][1]["sites"].values()} == {0.5}
    json.dumps(report, allow_nan=False)

    model = federation.material / "model"
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert float((adapted - base).abs().max()) > 0.05


@pytest.mark.slow(alone=True)
def test_ray_and_deepspeed_give_what_plain_local_training_gives_though_ray_dies(federation: Any, wait: Any) -> None:
    federation.coordinate("--log-format", "json", executor="ray")
    federation.join("hospital", engine="deepspeed")
    with federation.connect() as session:
        run = session.submit(whole(federation))
        wait(lambda: run.refresh().state == "running", "a supervisor")
        tree = federation.tree("coordinator")
        listening = {f"{at.ip}:{at.port}" for process in tree for at in listens(process)}
        assert len(listening) > 4, "Ray's own processes are among them"
        assert {at for at in listening if "127.0.0.1:" not in at} == set()
        next(process for process in tree if process.name() == "raylet").kill()
        folder = run.result(federation.folder / "out")
        of_steps = logged_by_ray(federation.tree("coordinator"), run.id)
        assert {("build", None), ("aggregate", 1), ("publish", None)} <= {
            (one["step"], one.get("round")) for one in of_steps
        }
        heavy = [" ".join(process.cmdline()) for process in federation.tree("coordinator") if has_torch(process)]
    assert ["coordinator up" in heavy[0], "coordinator.runs.steps.process" in heavy[-1], len(heavy)] == [True, True, 2]
    federation.stop()
    forks = partial(psutil.process_iter, ["cmdline"])
    wait(lambda: not [process for process in forks() if str(federation.folder) in writes(process)], "their end")
    assert not address(federation.folder / "home").exists()
    for key, given, wanted in trained(federation, folder):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5, msg=key)
    assert (federation.folder / "home" / "ray-token").stat().st_mode & 0o777 == 0o600
    written = federation.log("coordinator").read_text().splitlines()
    lines = [json.loads(line) for line in written if line.startswith("{")]
    others = "\n".join(line for line in written if not line.startswith("{"))
    assert not others or "grpc._cython" in others, "gRPC itself tells of a call that ends in the midst of the stop"
    said = [line["message"] for line in lines if line.get("level") in ("warning", "error")]
    assert "its raylet on this machine" in said[0] and "is back; the runs go on" in said[-1]
    assert len(said) == 2, "nothing of Ray's own is in the coordinator's output"


def logged_by_ray(tree: list[psutil.Process], run: str) -> list[dict[str, Any]]:
    """What a run's steps have logged since Ray was started last: lines of Ray's files that are JSON."""
    raylet = next(process for process in tree if process.name() == "raylet")
    folder = next(part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--log_dir="))
    lines = [line for file in Path(folder).glob("worker-*.err") for line in file.read_text().splitlines()]
    said = [json.loads(line) for line in lines if line.startswith("{")]
    return [one for one in said if one.get("run") == run and "step" in one]


def listens(process: psutil.Process) -> list[Any]:
    """Where a process listens."""
    try:
        return [at.laddr for at in process.net_connections(kind="inet") if at.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def has_torch(process: psutil.Process) -> bool:
    """Whether a process has loaded the tensor library, which takes hundreds of megabytes."""
    try:
        return any("libtorch" in at.path for at in process.memory_maps())
    except psutil.NoSuchProcess:
        return False


def writes(process: psutil.Process) -> str:
    """The files that a process which forks steps, or was forked for one, has open."""
    try:
        if "offsite.coordinator.runs.steps.process" not in (process.info["cmdline"] or ()):
            return ""
        return " ".join(file.path for file in process.open_files())
    except psutil.NoSuchProcess:
        return ""
