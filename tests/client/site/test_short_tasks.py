"""Why a site refuses tasks of few steps: AdamW's epsilon undoes the first, and the upload is the gradient again.

The gradient of a batch is its words. Noise on the upload takes both back to what the signs of the change tell.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offsite.client.site.engines.base import Ranks
from offsite.client.site.engines.plain import Plain
from offsite.client.site.job import EngineSpec, TrainerJob
from offsite.client.site.policy import Policy
from offsite.client.site.training import train
from offsite.emulator import bundle, methods, modality
from offsite.emulator.modality import collate, encode, read
from offsite.emulator.modality.causal_text.batch import TokenBatch
from offsite.emulator.tuning.adapting import shares
from offsite.kernels.schema import Schema, TensorMap, Tensors, settle
from offsite.protos import tensors, upload
from offsite.protos.errors import RefusedError
from offsite.protos.spec import Choice, LocalTraining

EPSILON = 1e-8  # of AdamW
NOISE = (Choice(name="noise"),)
POLICY = Policy(bases=("any",), data=("/",))


def inverted(change: torch.Tensor, rate: float, *, blur: float = 1e-9) -> torch.Tensor:
    """The gradient of one step of AdamW: a change of rate / (1 + epsilon / |g|), solved for g.

    What comes nearer to the rate than `blur`, as a share of it, is taken to be no larger than that tells.
    """
    share = (change.double() / rate).abs().clamp(max=1 - blur)
    return -change.sign() * EPSILON * share / (1 - share)


def sent(trained: Tensors, start: Tensors, schema: Schema, chain: tuple[Choice, ...]) -> TensorMap:
    """What the coordinator has of an adapter."""
    stages = upload.make(chain)
    schema = settle(schema, {key: tensor.shape for key, tensor in start.items()})
    parts = upload.pack(stages, trained, start, schema, key=bytes(32))
    packed = {key: tensor for part in parts for key, tensor in part.update.items()}
    return upload.unpack(stages, packed, start, schema)


def attacked(job: TrainerJob, steps: int, chain: tuple[Choice, ...] = ()) -> float:
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
    modality.loss(model, batches[0]).backward()
    torch.nn.utils.clip_grad_norm_(list(trained.values()), training.gradient_clipping)
    keys = [key for key in trained if key.endswith(".B")]
    true = torch.cat([trained[key].grad.flatten() for key in keys]).double()  # type: ignore[union-attr]
    model.zero_grad()
    engine = Plain(model, trained, training, job.engine, Ranks(0, 1, torch.device("cpu")))
    for batch in batches:
        engine.step(batch)
    adapter = sent(method.state(model, places), start, method.schema(start), chain)
    change = torch.cat([(adapter[key] - start[key]).flatten() for key in keys])
    far = training.learning_rate * sum(shares(training)[:steps])
    return float(torch.cosine_similarity(inverted(change, far), true, dim=0))


def test_one_step_hands_over_the_gradient_and_the_fewest_allowed_do_not(job: Any) -> None:
    asked = job(training={"gradient_clipping": 1e-3})  # the least that a policy allows by default
    assert attacked(asked, 1) >= 0.95
    assert attacked(asked, 4) <= 0.7


@pytest.mark.parametrize("schedule", ["polynomial(power=30)", "polynomial(power=300)"])
def test_of_four_steps_whose_rate_falls_at_once_the_first_hands_over_the_gradient_and_a_site_refuses_them(
    job: Any, tmp_path: Path, schedule: str
) -> None:
    asked = job(training={"gradient_clipping": 1e-3, "steps": 4, "schedule": schedule}, policy={"min_steps": 4})
    assert attacked(asked, 4) >= 0.9
    with pytest.raises(RefusedError, match=r"\(min_steps\): .* learning rate: 4 count as 1.*, at least 3 allowed"):
        train(asked, say=lambda event, **fields: None, rendezvous=tmp_path / "rendezvous")


@pytest.mark.parametrize(("steps", "schedule"), [(4, "linear"), (4, "cosine"), (5, "polynomial(power=2)")])
def test_a_falling_rate_that_a_site_allows_does_not_hand_over_the_gradient(job: Any, steps: int, schedule: str) -> None:
    asked = job(training={"gradient_clipping": 1e-3, "steps": steps, "schedule": schedule})
    POLICY.check_shares(shares(asked.task.training))
    assert attacked(asked, steps) <= 0.7


def test_noise_keeps_the_gradient_of_one_step(job: Any) -> None:
    asked = job(training={"gradient_clipping": 1e-2})
    assert attacked(asked, 1) >= 0.95
    assert attacked(asked, 1, NOISE) <= 0.5


@dataclass(frozen=True)
class Step:
    """One step of a later round, when no factor of an adapter is zero any more, on a batch of one row."""

    words: set[int]
    vectors: torch.Tensor  # what the first layer reads for each word of the vocabulary (v, d), of length 1
    start: Tensors
    trained: Tensors
    schema: Schema
    rate: float


@pytest.fixture(scope="module")
def step() -> Step:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=192,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():  # trained ones have much in common: in SmolLM2-135M 0.86 of their length
        embeddings.copy_(0.02 * (0.86 * torch.randn(192) + 0.51 * torch.randn(1000, 192)))
    method, places = methods.make("lora", {"rank": 8}), {0: 0, 3: 3}
    start = method.start(model, places, seed=0)
    start |= {key: 5e-3 * torch.randn(factor.shape) for key, factor in start.items() if key.endswith(".B")}
    attached = method.attach(model, places, start)
    training = LocalTraining(batch_size=1, learning_rate=3e-3, gradient_clipping=1e-2)
    engine = Plain(
        attached,
        method.named_parameters(attached, places),
        training,
        EngineSpec(name="plain", device="cpu", threads=1),
        Ranks(0, 1, torch.device("cpu")),
    )
    row = torch.randint(1000, (1, 32), generator=torch.Generator().manual_seed(3))
    engine.step(TokenBatch(row, torch.ones_like(row), row))
    return Step(
        words=set(row.flatten().tolist()),
        vectors=torch.nn.functional.normalize(embeddings.detach().double()),
        start=start,
        trained=method.state(attached, places),
        schema=method.schema(start),
        rate=training.learning_rate,
    )


def recovered(step: Step, chain: tuple[Choice, ...], *, blur: float = 1e-9) -> float:
    """Share of a batch's words among as many guesses of simultaneous orthogonal matching pursuit (Tropp et al., 2006).

    The gradient of A in a map of the first layer is made of what that layer reads: each row is a sum of words' vectors.
    """
    adapter = sent(step.trained, step.start, step.schema, chain)
    keys = [f"0.self_attn.{kind}_proj.A" for kind in "qkv"]
    gradient = torch.cat([inverted(adapter[key] - step.start[key], step.rate, blur=blur) for key in keys])
    rest, guesses = gradient, list[int]()
    for _ in step.words:
        likeness = (rest @ step.vectors.T).square().sum(0)
        likeness[guesses] = -1
        guesses.append(int(likeness.argmax()))
        known = step.vectors[guesses]
        rest = gradient - torch.linalg.lstsq(known.T, gradient.T).solution.T @ known
    return len(step.words.intersection(guesses)) / len(step.words)


def test_the_words_of_a_batch_are_read_off_one_step_and_noise_of_a_hundredth_ends_that(step: Step) -> None:
    assert len(step.words) == 31
    assert recovered(step, ()) >= 0.8  # measured: 0.94
    assert recovered(step, NOISE) <= 0.2  # 0.00; by chance 0.03
    assert recovered(step, NOISE, blur=0.02) <= 0.35  # 0.26: who knows of the noise is left with the signs
