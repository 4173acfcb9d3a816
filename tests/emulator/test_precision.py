"""A race decides on bf16, once on a machine."""

import json
from pathlib import Path

import pytest
import torch

from offsite.emulator import precision
from offsite.emulator.precision import Race, fastest, in_fp32, race

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFSITE_CACHE", str(tmp_path))
    return tmp_path


def timed(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> None:
    monkeypatch.setattr(precision, "_times", lambda: {"fp32": fp32, "bf16": bf16})


def test_bf16_must_be_clearly_faster() -> None:
    assert [Race(10.0, bf16).fastest for bf16 in (4.0, 7.9, 8.1, 15.0)] == ["bf16", "bf16", "fp32", "fp32"]


def test_it_is_run_once_and_its_result_holds_for_every_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 10.0, 4.0)
    assert fastest(CPU) == "bf16"
    timed(monkeypatch, 10.0, 15.0)  # a busy moment later
    assert fastest(CPU) == "bf16" and "fp32 took 10.0 ms, bf16 4.0 ms" in str(race())
    (kept,) = (cache / "races").glob("*.json")
    kept.write_text("{")  # cut off by a full disk: run again
    assert fastest(CPU) == "fp32" and json.loads(kept.read_text())["bf16"] == 15.0
    threads = torch.get_num_threads()
    timed(monkeypatch, 10.0, 4.0)
    try:
        torch.set_num_threads(threads + 1)
        assert fastest(CPU) == "bf16", "another number of threads is another race"
    finally:
        torch.set_num_threads(threads)


def test_where_it_cannot_be_kept_nobody_races(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 10.0, 4.0)
    (cache / "races").write_text("not a folder")
    assert fastest(CPU) == "fp32"


def test_a_real_race_takes_time_and_has_a_winner(cache: Path) -> None:
    found = race()
    assert found.fp32 > 0 < found.bf16 and race() == found


def test_what_is_in_another_dtype_is_as_it_was_afterwards() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).bfloat16(), torch.nn.BatchNorm1d(4)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = list(model.parameters())
    with in_fp32(model):
        assert model(torch.ones(2, 4)).dtype == torch.float32
    assert [id(p) for p in model.parameters()] == [id(p) for p in own]
    after = model.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
