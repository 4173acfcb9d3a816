"""Why a site refuses tasks of few steps: AdamW's epsilon undoes the first, and the upload is the gradient again."""

from pathlib import Path
from typing import Any

import torch

from offsite.client.site.engines.base import Ranks
from offsite.client.site.engines.plain import Plain
from offsite.client.site.job import TrainerJob
from offsite.emulator import bundle, likelihood, methods
from offsite.emulator.batches import collate, encode
from offsite.emulator.examples import read
from offsite.protos import tensors

EPSILON = 1e-8  # of AdamW


def inverted(change: torch.Tensor, rate: float) -> torch.Tensor:
    """The gradient of one step of AdamW: a change of rate / (1 + epsilon / |g|), solved for g."""
    share = (change.double() / rate).abs().clamp(max=1 - 1e-9)
    return -change.sign() * EPSILON * share / (1 - share)


def attacked(job: TrainerJob, steps: int) -> float:
    """Cosine of what the owner computes from the change of B, and the first step's clipped gradient."""
    torch.set_num_threads(1)
    training = job.task.training
    model, tokenizer = bundle.load(Path(job.bundle), layout=bundle.described(job.manifest), dtype=torch.float32)
    places = bundle.described(job.manifest).outline.places
    method = methods.make(job.task.method.name, job.task.method.settings)
    start = tensors.load(Path(job.adapter))
    model = method.attach(model, places, start)
    trained = method.named_parameters(model, places)
    rows = encode(read(Path(job.data)), tokenizer, max_length=training.max_length)
    batches = [collate(rows[4 * at : 4 * at + 4]) for at in range(steps)]
    likelihood.loss(model, batches[0]).backward()
    torch.nn.utils.clip_grad_norm_(list(trained.values()), training.gradient_clipping)
    keys = [key for key in trained if key.endswith(".B")]
    true = torch.cat([trained[key].grad.flatten() for key in keys]).double()  # type: ignore[union-attr]
    model.zero_grad()
    engine = Plain(model, trained, training, job.engine, Ranks(0, 1, torch.device("cpu")))
    for batch in batches:
        engine.step(batch)
    found = method.state(model, places)
    change = torch.cat([(found[key] - start[key]).flatten() for key in keys])
    return float(torch.cosine_similarity(inverted(change, training.learning_rate * steps), true, dim=0))


def test_one_step_hands_over_the_gradient_and_the_fewest_allowed_do_not(job: Any) -> None:
    asked = job(training={"gradient_clipping": 1e-3})  # the least that a policy allows by default
    assert attacked(asked, 1) >= 0.95
    assert attacked(asked, 4) <= 0.7
