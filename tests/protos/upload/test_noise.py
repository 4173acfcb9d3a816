"""Noise: as much as asked for, where something changed, and the same again only for the same change."""

import pytest
import torch

from offsite.kernels.schema import Field, Rule, Schema, Tensors
from offsite.protos import upload
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice
from offsite.protos.upload.base import At
from offsite.protos.upload.noise import Noise

KEY = bytes(range(32))
SCHEMA: Schema = {
    "0.q.A": Field("F32", (300, 400), Rule.PRODUCT, "0.q"),
    "0.q.B": Field("F32", (500, 300), Rule.PRODUCT, "0.q"),
    "1.norm": Field("F32", (1000,), Rule.MEAN),
    "1.index": Field("I32", (7,), Rule.FIXED, below=9),
    "1.mask": Field("F32", (7,), Rule.FIXED),
}


def change(seed: int = 0) -> Tensors:
    """B changed a hundred times as much as A, the norm not at all."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "0.q.A": torch.randn(300, 400, generator=generator) * 1e-5,
        "0.q.B": torch.randn(500, 300, generator=generator) * 1e-3,
        "1.norm": torch.zeros(1000),
        "1.index": torch.arange(7, dtype=torch.int32),
        "1.mask": torch.ones(7),
    }


def noise(share: float = 0.01, *, key: bytes = KEY, seed: int = 0) -> Tensors:
    return Noise(share=share).pack(change(seed), At(SCHEMA, key))


def added(packed: Tensors, seed: int = 0) -> torch.Tensor:
    return torch.cat([(packed[key] - change(seed)[key]).flatten() for key in ("0.q.A", "0.q.B")])


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_it_is_gaussian_and_of_the_share_asked_for_in_the_rms_of_the_group(share: float) -> None:
    rms = torch.cat([change()["0.q.A"].flatten(), change()["0.q.B"].flatten()]).square().mean().sqrt()
    drawn = added(noise(share)).double() / (share * rms)
    for factor in drawn.split([300 * 400, 500 * 300]):
        assert abs(float(factor.mean())) < 0.01
        assert float(factor.std()) == pytest.approx(1, abs=0.01)
        assert float((factor**4).mean()) == pytest.approx(3, abs=0.1)
        assert float(factor.abs().max()) > 3.5
        within = float((factor.abs() < 0.6745).double().mean())
        assert within == pytest.approx(0.5, abs=0.01)


def test_what_did_not_change_what_is_fixed_and_integers_stay_as_they_are() -> None:
    packed = noise()
    assert packed.keys() == SCHEMA.keys()
    for key in ("1.norm", "1.index", "1.mask"):
        assert torch.equal(packed[key], change()[key]) and packed[key].dtype == change()[key].dtype


def test_the_same_change_of_the_same_task_gets_the_same_noise_and_any_other_another() -> None:
    drawn = added(noise())
    assert torch.equal(drawn, added(noise()))
    others = [added(noise(key=b"other task or site" + bytes(14))), added(noise(seed=1), seed=1)]
    moved = change()
    moved["0.q.A"][0, 0] += 1e-6  # in the last digits
    nearly = Noise().pack(moved, At(SCHEMA, KEY))
    others.append(torch.cat([(nearly[key] - moved[key]).flatten() for key in ("0.q.A", "0.q.B")]))
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 0.01


def test_the_values_of_a_group_are_drawn_apart() -> None:
    drawn = added(noise(1.0))
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1])) < 0.01
    half = len(drawn) // 2
    assert abs(float(torch.corrcoef(torch.stack([drawn[:half], drawn[half : 2 * half]]))[0, 1])) < 0.01


def test_a_change_keeps_its_arguments() -> None:
    given = change()
    Noise().pack(given, At(SCHEMA, KEY))
    assert all(torch.equal(given[key], change()[key]) for key in SCHEMA)


@pytest.mark.parametrize("share", [0, -1.0, 101.0, "0.01", None])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(InputError, match="upload: stage 'noise': share"):
        upload.make([Choice(name="noise", settings={"share": share})])


def test_bits_are_refused_for_no_small_noise_covers_one() -> None:
    bits: Schema = {"0.q.mask": Field("U8", (2,), Rule.VOTE, bits=12)}
    with pytest.raises(ValueError, match=r"stage noise adds a little to values, and 0\.q\.mask is of bits"):
        upload.schema_of([Noise()], SCHEMA | bits)
