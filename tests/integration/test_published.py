"""What is trained otherwise than in floats that are averaged, over real processes: bits, codes, a part at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite.client import Choice
from offsite.emulator import zoo
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.modality import encode, read, score
from offsite.emulator.plug import load
from offsite.protos.recipes import parse_one

SITES = ("east", "west")
METHODS = ("amt", "bi-lora", "blocks")
SEED = 4  # with which each of the two rounds draws another layer


@pytest.fixture(scope="module")
def sites(coordinated: Any) -> tuple[str, ...]:
    """Two sites that allow these methods have joined."""
    policy = f'bases = ["any"]\nmethods = {[*METHODS]}\n'.replace("'", '"')
    for site, data in zip(SITES, ("bank", "hospital"), strict=True):
        coordinated.join(site, data=coordinated.material / f"{data}.jsonl", policy=policy)
    return SITES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "strategy", "part"),
    [
        ("amt", "vote", "all"),
        ("bi-lora(rank=4,bits=2)", "requantise", "all"),
        ("blocks", "mean", "lisa(layers=1)"),
    ],
)
def test_two_rounds_of_two_sites_publish_what_was_measured(
    coordinated: Any, sites: tuple[str, ...], tmp_path: Path, method: str, strategy: str, part: str
) -> None:
    torch.set_num_threads(1)
    material: Path = coordinated.material
    spec = coordinated.spec(
        **{"rounds": 2, "sites": sites, "min_sites": 2, "merge": True, "method": parse_one(method)},
        **{"strategy": Choice(name=strategy), "evaluation": {"exam": str(material / "held-out.jsonl")}},
    )
    with coordinated.connect() as session:
        run = session.submit(replace(spec, training=replace(spec.training, part=parse_one(part), seed=SEED)))
        out = run.result(tmp_path / "out")
        report = run.report
    assert [sorted(one["sites"]) for one in report["rounds"]] == [list(sites)] * 2
    figures = report["overall"]
    assert figures["plug_in"] < figures["base_zero_shot"]

    original, tokenizer = zoo.load_base(material / "model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    exam = encode(read(material / "held-out.jsonl"), tokenizer, max_length=32)
    assert score(merged, evaluation_batches(exam, batch_size=8)).perplexity == pytest.approx(figures["plug_in"])
    before, after = original.state_dict(), merged.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[2] for name in changed} == {"0", "5"}
    if method == "amt":
        assert all(bool(((after[name] == before[name]) | (after[name] == 0)).all()) for name in changed)
    if method == "blocks":
        (stored,) = (out / "adapter").glob("*.safetensors")
        sent = [site["bytes_up"] for one in report["rounds"] for site in one["sites"].values()]
        assert sent == pytest.approx([stored.stat().st_size / 2] * 4, rel=0.05), "one layer of two"
        return
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        beside = load(original.eval(), out / "adapter")
        torch.testing.assert_close(beside(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
