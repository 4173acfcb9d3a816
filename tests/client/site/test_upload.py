"""What a trainer leaves to be sent where a task asks for stages of its upload."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client.site.job import TrainerJob
from offsite.client.site.training import train
from offsite.kernels.schema import Field, Rule
from offsite.protos import tensors
from offsite.protos.errors import MismatchError
from offsite.protos.spec import Choice
from offsite.protos.upload.base import At

NOISE = (Choice(name="noise"),)
TOP = (Choice(name="top", settings={"share": 0.125}),)


def trained(job: TrainerJob, folder: Path) -> bytes:
    torch.set_num_threads(1)
    train(job, say=lambda event, **fields: None, rendezvous=folder / "rendezvous")
    return (Path(job.out) / "update.safetensors").read_bytes()


def test_a_task_that_is_repeated_sends_the_same_bytes_and_another_site_others(job: Any, tmp_path: Path) -> None:
    first = trained(job(upload=NOISE), tmp_path)
    assert trained(job(upload=NOISE), tmp_path) == first
    (tmp_path / "secret").write_bytes(bytes(32))
    assert trained(job(upload=NOISE, secret=tmp_path / "secret"), tmp_path) != first
    assert not (tmp_path / "out" / "residual.safetensors").exists(), "nothing is fed back"


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


def test_what_is_left_out_is_sent_later_and_the_same_again_by_a_task_that_is_repeated(
    top: Any, job: Any, tmp_path: Path
) -> None:
    asked, start = job(upload=TOP), tensors.load(Path(job().adapter))
    first = trained(asked, tmp_path)
    update, left = Path(asked.out) / "update.safetensors", Path(asked.out) / "residual.safetensors"
    trained(job(), tmp_path)
    schema = {name: Field("F32", tuple(tensor.shape), Rule.MEAN, name[:-2]) for name, tensor in start.items()}
    whole = {name: tensor - start[name] for name, tensor in tensors.load(update).items()}
    update.write_bytes(first)
    kept = left.rename(tmp_path / "kept")
    later = replace(asked, residual=str(kept))
    second = trained(later, tmp_path)
    residual, more = tensors.load(kept), tensors.load(left)
    assert second != first == trained(asked, tmp_path) and second == trained(later, tmp_path)
    tensors.save(update, tensors.load(update))
    for name, change in whole.items():  # the same training twice: of both changes, what was sent and what stays
        stage, at = top(share=0.125), At({name: schema[name]})

        def sent(file: bytes, stage: Any = stage, at: At = at, name: str = name) -> torch.Tensor:
            (tmp_path / "one").write_bytes(file)
            values = tensors.load(tmp_path / "one", stage.schema(at.schema))
            return stage.unpack(values, at)[name]  # type: ignore[no-any-return]

        assert torch.equal(sent(first) + residual[f"0.{name}"], change)
        assert torch.allclose(sent(first) + sent(second) + more[f"0.{name}"], 2 * change, rtol=1e-5, atol=1e-9)


def test_what_was_left_out_of_an_update_of_another_kind_is_refused(top: Any, job: Any, tmp_path: Path) -> None:
    tensors.save(tmp_path / "kept", {"0.some": torch.ones(2)})
    with pytest.raises(MismatchError, match="what was left out of the site's last update: tensor .* is missing"):
        trained(replace(job(upload=TOP), residual=str(tmp_path / "kept")), tmp_path)
    assert not (tmp_path / "out" / "update.safetensors").exists()


def test_no_update_is_there_to_be_sent_before_what_it_leaves_out_is_kept(top: Any, job: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "residual.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        trained(job(upload=TOP, training={"steps": 1}), tmp_path)
    assert not (tmp_path / "out" / "update.safetensors").exists()
