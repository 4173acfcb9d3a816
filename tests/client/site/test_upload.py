"""What a trainer leaves to be sent where a task asks for stages of its upload."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client.site.job import TrainerJob
from offsite.client.site.training import train
from offsite.protos import tensors
from offsite.protos.spec import Choice

NOISE = (Choice(name="noise"),)


def trained(job: TrainerJob, folder: Path) -> bytes:
    torch.set_num_threads(1)
    train(job, say=lambda event, **fields: None, rendezvous=folder / "rendezvous")
    return (Path(job.out) / "update.safetensors").read_bytes()


def test_a_task_that_is_repeated_sends_the_same_bytes_and_another_site_others(job: Any, tmp_path: Path) -> None:
    first = trained(job(upload=NOISE), tmp_path)
    assert trained(job(upload=NOISE), tmp_path) == first
    (tmp_path / "secret").write_bytes(bytes(32))
    assert trained(job(upload=NOISE, secret=tmp_path / "secret"), tmp_path) != first


def test_the_change_leaves_with_a_hundredth_of_its_size_in_noise(job: Any, tmp_path: Path) -> None:
    asked = job()
    trained(asked, tmp_path)
    update, start = Path(asked.out) / "update.safetensors", tensors.load(Path(asked.adapter))
    change = {key: tensor - start[key] for key, tensor in tensors.load(update).items()}
    trained(job(upload=NOISE), tmp_path)
    noisy = tensors.load(update)
    assert noisy.keys() == change.keys()
    for group in {key[:-2] for key in change}:
        was = torch.cat([change[f"{group}.{factor}"].flatten() for factor in "AB"])
        now = torch.cat([noisy[f"{group}.{factor}"].flatten() for factor in "AB"])
        assert float((now - was).norm() / was.norm()) == pytest.approx(0.01, rel=0.3)
