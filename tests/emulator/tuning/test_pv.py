"""PV-Tuning on least squares with 2 bits a weight: what it beats, what it may not change, and where it cannot help."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from offsite.emulator.batches import Encoded, evaluation_batches
from offsite.emulator.builders import Material, make, run
from offsite.emulator.formats.additive import Additive
from offsite.emulator.formats.packed import PackedLinear
from offsite.emulator.placements import Kept
from offsite.emulator.tuning import pv
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.kernels import codebook

FORMAT = Additive(group=4, codebooks=2, bits=4, precision="float32")  # 2 bits a weight
SIDE, STEPS, RATE = 64, 120, 1e-2
GROUPS = SIDE * SIDE // FORMAT.group


@dataclass
class Squares:
    """Find W from what it makes of inputs that are correlated, or not at all."""

    wanted: Tensor
    inputs: Tensor

    def map(self) -> PackedLinear:
        importance = self.inputs.square().mean(dim=0).double()
        parts = FORMAT.encode(self.wanted, importance, torch.Generator().manual_seed(0))
        return PackedLinear(FORMAT, parts, None, d_out=SIDE, d_in=SIDE)

    def loss(self, map: PackedLinear) -> Callable[[], Tensor]:
        return lambda: (map(self.inputs) - self.inputs @ self.wanted.T).square().mean()

    def tuned(self, *, fraction: float) -> tuple[float, list[pv.Step], PackedLinear]:
        map = self.map()
        loss = self.loss(map)
        steps = pv.tune([map], [loss] * STEPS, steps=STEPS, learning_rate=RATE, fraction=fraction)
        return float(loss().detach()), steps, map

    def straight_through(self, rate: float) -> float:
        """The baseline: dense weights take the gradient of what they are rounded to; the best loss on the way."""
        map, dense = self.map(), self.wanted.clone()
        loss = self.loss(map)
        optimizers = (
            torch.optim.Adam(pv._continuous([map], RATE), betas=(0.9, 0.95)),
            torch.optim.Adam([dense], lr=rate),
        )
        schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 - step / STEPS) for each in optimizers]
        best = float(loss().detach())
        for _ in range(STEPS):
            (dense.grad,) = pv.p_step([map], optimizers[0], loss)
            optimizers[1].step()
            for schedule in schedules:
                schedule.step()
            with torch.no_grad():
                groups = (dense / map.scales[:, None]).view(-1, FORMAT.group)
                held = FORMAT.unpack(map.codes, GROUPS)
                map.codes.copy_(FORMAT.pack(codebook.encode(groups, map.codebooks, held=held, beam=8)))
                best = min(best, float(loss()))
        return best


def squares(*, correlated: bool) -> Squares:
    generator = torch.Generator().manual_seed(1)
    wanted, noise = (torch.randn(rows, SIDE, generator=generator) for rows in (SIDE, 256))
    if correlated:
        low_rank = torch.randn(256, 8, generator=generator) @ torch.randn(8, SIDE, generator=generator)
        return Squares(wanted, low_rank / 8**0.5 + 0.3 * noise)
    return Squares(wanted, torch.linalg.qr(noise)[0] * 256**0.5)


@pytest.fixture(scope="module")
def correlated() -> Squares:
    torch.set_num_threads(1)
    return squares(correlated=True)


def test_on_correlated_inputs_it_beats_straight_through_and_codebooks_alone(correlated: Squares) -> None:
    tuned, _, _ = correlated.tuned(fraction=0.02)
    alone, no_steps, _ = correlated.tuned(fraction=0.0)
    assert no_steps == []
    assert tuned <= 0.5 * alone
    assert tuned <= 0.8 * min(correlated.straight_through(rate) for rate in (3e-3, 1e-2, 3e-2))


def test_on_inputs_that_are_not_correlated_rounding_is_as_good() -> None:
    problem = squares(correlated=False)
    tuned, alone = problem.tuned(fraction=0.02)[0], problem.tuned(fraction=0.0)[0]
    assert tuned == pytest.approx(alone, rel=0.02)


def test_a_v_step_stays_only_if_the_loss_falls_and_changes_few_codes(correlated: Squares) -> None:
    map = correlated.map()
    loss = correlated.loss(map)
    optimizer = torch.optim.Adam(pv._continuous([map], RATE))
    slopes = [torch.zeros(SIDE, SIDE)]
    kept = undone = 0
    for trust in (0.3, 0.3, 1.0, 30.0, 100.0):
        slopes = pv.p_step([map], optimizer, loss)
        before, codes = float(loss().detach()), map.codes.clone()
        step = pv.v_step([map], slopes, loss, fraction=0.02, trust=trust)
        moved = (FORMAT.unpack(map.codes, GROUPS) != FORMAT.unpack(codes, GROUPS)).any(dim=1).sum()
        assert step.before == before and step.kept == (step.after < step.before)
        assert float(loss().detach()) == (step.after if step.kept else before)
        assert int(moved) <= 0.02 * GROUPS and (step.kept or not moved)
        kept, undone = kept + step.kept, undone + (not step.kept)
    assert kept and undone, "both were seen"


def test_a_loss_that_is_not_finite_is_refused(correlated: Squares) -> None:
    map = correlated.map()
    with pytest.raises(ValueError, match="a lower learning_rate may help"):
        pv.tune([map], [lambda: map(correlated.inputs).sum() * float("nan")], steps=1, learning_rate=1.0, fraction=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_model_that_has_learned_something_changing_codes_beats_codebooks_alone(seed: int) -> None:
    """Half a bit a weight, after 80 steps towards what the base predicts."""
    torch.set_num_threads(1)
    base, text = learned(seed)
    held_out = evaluation_batches(text[192:], batch_size=32)
    material = Material(batches=evaluation_batches(text[:64], batch_size=32), encoded=text[:192])

    def divergence(fraction: float) -> float:
        settings = {"group": 8, "codebooks": 1, "bits": 4, "steps": 80, "batch_size": 16, "layers": "all"}
        draft = run([make("additive", settings | {"code_fraction": fraction})], Kept(), base, material)
        with torch.no_grad():
            return sum(loss().item() for loss in pv.divergences(draft.model, base, held_out))

    assert divergence(0.02) < 0.96 * divergence(0.0)


def learned(seed: int) -> tuple[Any, list[Encoded]]:
    """A tiny Llama that has learned which two words may follow each, and such texts."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tokens, **shape, num_hidden_layers=3))
    generator = torch.Generator().manual_seed(seed)
    followers = torch.randint(3, 96, (96, 2), generator=generator).tolist()
    text = []
    for _ in range(256):
        words = torch.randint(3, 96, (1,), generator=generator).tolist()
        for rare in (torch.rand(23, generator=generator) < 0.3).tolist():
            words.append(followers[words[-1]][rare])
        text.append(Encoded(tuple(words), tuple(words)))
    schedule = Schedule(150, 1e-2, batch_size=16, decay="cosine")
    tune(model, dict(model.named_parameters()), text[:192], schedule)
    return model.eval(), text
