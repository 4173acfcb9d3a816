"""The identity-pipe attack (PEFTLeak, arXiv 2506.04453), built for real: it reads a site's text off one update, unless
the site looks at what it was handed first.

The owner zeroes what every frozen layer adds, so that the top layer, the only one that trains, reads the embeddings of
the text. Of y = W x + scale * B A x the gradient of A is the sum over tokens of scale * B^T (dL/dy) x^T, so that with
B != 0 its rows span the x of exactly the tokens that are there. AdamW would leave only its signs, but where gradients
are clipped to far below its epsilon the step is proportional to the gradient; clipping is the owner's choice as well.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offsite.client.site.inspection import is_derived, receive, strange_start
from offsite.client.site.job import TrainerJob
from offsite.client.site.training import train
from offsite.emulator import bundle, methods
from offsite.emulator.outline import Outline
from offsite.protos import tensors
from offsite.protos.errors import InputError, MismatchError, RefusedError
from offsite.protos.spec import Ancestor, Choice

TOP = Outline(layers=(0, 2, 3, 5), trainable=(5,))
LORA = Choice(name="lora", settings={"rank": 16, "alpha": 32.0})
SECRET = [5, 17, 33, 40, 9, 22, 31, 8]  # the words of the site's one example
STEP = {"steps": 1, "batch_size": 1, "gradient_clipping": 1e-12, "learning_rate": 1e4}

Change = Callable[[Any], None]


def honest(thing: Any) -> None:
    """Leave it as it is."""


def pipe(model: Any) -> None:
    """Have the frozen layers hand on what they read."""
    for layer in model.model.layers[:3]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


def turned(model: Any) -> None:
    """Have the frozen layers turn each word into something else by itself: no layer attends to any word but its own."""
    draw = torch.Generator().manual_seed(0)
    for layer in model.model.layers[:3]:
        attention, layer.mlp.down_proj.weight.data = layer.self_attn, torch.zeros_like(layer.mlp.down_proj.weight)
        seen = torch.linalg.qr(torch.randn(32, 16, generator=draw))[0].T  # two KV heads of eight each
        attention.k_proj.weight.data = 30 * seen
        attention.q_proj.weight.data = 30 * seen.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
        attention.v_proj.weight.data = seen
        turn = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0] - torch.eye(16)
        back = torch.zeros(32, 4, 8)
        back[:, ::2] = (seen.T @ turn).view(32, 2, 8)  # of the two heads of a group the first speaks
        attention.o_proj.weight.data = back.reshape(32, 32)


def open_tap(adapter: methods.Adapter) -> None:
    """Give the factors B of the first adapter values that let gradients through to A."""
    for key in adapter:
        if key.endswith(".B"):
            adapter[key] = 0.1 * torch.randn(adapter[key].shape, generator=torch.Generator().manual_seed(8))


def stored(folder: Path) -> Any:
    """Return the honest emulator, a random Llama of four layers that change what they read as much as trained ones."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "bundle")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


@dataclass
class Handout:
    """A maker of jobs with a bundle and an adapter of the owner's choice; the events of the last job that was run."""

    job: Any
    folder: Path
    material: Path
    events: list[dict[str, Any]]

    def make(self, *, model: Change = honest, adapter: Change = honest, tier: str = "r16", **changes: Any) -> Any:
        stack = stored(self.material)
        model(stack)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.material / "bundle")
        shutil.rmtree(self.folder / "bundle", ignore_errors=True)
        bundle.save(stack, tokenizer, self.folder / "bundle", outline=TOP)
        method = methods.make(LORA.name, LORA.settings)
        start = method.start(stack, TOP.places, seed=0, tier=tier)
        adapter(start)
        tensors.save(self.folder / "start.safetensors", start)
        data = self.folder / "data.jsonl"
        words = [f"w{word}" for word in SECRET]
        data.write_text(json.dumps({"prompt": " ".join(words[:3]), "completion": " ".join(words[3:])}))
        bounds = {name: changes.pop(name) for name in ("suspicious", "max_emulator_perplexity") if name in changes}
        one = self.job(data=data, training=STEP | changes.pop("training", {}), policy=bounds)
        return replace(
            one,
            bundle=str(self.folder / "bundle"),
            manifest=replace(one.manifest, trainable=TOP.trainable),
            adapter=str(self.folder / "start.safetensors"),
            task=replace(
                one.task,
                method=LORA,
                tier=changes.pop("told", tier),
                round=changes.pop("round", 0),
                continues=changes.pop("continues", None),
            ),
            **changes,
        )

    def run(self, job: TrainerJob) -> methods.Adapter:
        """Train in this process and return the change since the broadcast."""
        self.events.clear()
        train(
            job,
            say=lambda event, **fields: event != "data" and self.events.append({"event": event, **fields}),
            rendezvous=self.folder / "rendezvous",
        )
        update = tensors.load(Path(job.out) / "update.safetensors")
        return {key: update[key] - sent for key, sent in tensors.load(Path(job.adapter)).items()}


@pytest.fixture
def handout(job: Any, tmp_path: Path, site_files: Path) -> Iterator[Handout]:
    torch.set_num_threads(1)
    yield Handout(job, tmp_path, site_files, [])
    torch.use_deterministic_algorithms(False)


def read_off(change: methods.Adapter, job: TrainerJob) -> set[int]:
    """Return the words whose embeddings, as the top layer reads them, are closest to the span of A's change.

    As many as the span has dimensions: that is how many different words there are.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(job.bundle)
    with torch.no_grad():
        alone = model(torch.arange(model.config.vocab_size)[:, None], output_hidden_states=True).hidden_states[3]
        read = model.model.layers[3].input_layernorm(alone[:, 0])
    _, size, rows = torch.linalg.svd(change["5.self_attn.v_proj.A"], full_matrices=False)
    span = rows[size > 1e-4 * size[0]]
    outside = (read - read @ span.T @ span).norm(dim=1) / read.norm(dim=1)
    return {token - 4 for token in outside.argsort()[: len(span)].tolist()}  # the first four are no words


@pytest.mark.parametrize("model", [pipe, turned])
def test_an_identity_pipe_gives_every_word_away_and_honest_layers_do_not(handout: Handout, model: Change) -> None:
    attack = handout.make(model=model, adapter=open_tap, suspicious="warn")
    assert read_off(handout.run(attack), attack) == set(SECRET)
    inspected = handout.events[0]
    assert inspected["event"] == "inspected" and "suspicious" in inspected["warnings"][0]
    through_layers = handout.make(adapter=open_tap, suspicious="warn")
    assert len(read_off(handout.run(through_layers), through_layers) & set(SECRET)) <= 3  # one by guessing


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("adapter", [honest, open_tap])
@pytest.mark.parametrize(("model", "sign"), [(pipe, "hands its input on"), (turned, "reads each word apart")])
def test_an_identity_pipe_is_refused_before_any_gradient(
    handout: Handout, monkeypatch: pytest.MonkeyPatch, model: Change, sign: str, adapter: Change, round: int
) -> None:
    def backward(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient was taken")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    attack = handout.make(model=model, adapter=adapter, round=round)
    with pytest.raises(RefusedError, match=r"refuses the task \(suspicious\): ") as refusal:
        handout.run(attack)
    assert sign in str(refusal.value) or (adapter is open_tap and round == 0), "of several signs the first is told"
    assert not handout.events and not Path(attack.out).exists()
    with pytest.raises(AssertionError, match="a gradient"):
        handout.run(handout.make())


def test_a_first_adapter_of_the_owners_choice_is_refused_and_a_later_one_is_an_average(handout: Handout) -> None:
    with pytest.raises(RefusedError, match=r"is not the start that .* seed give \(5.self_attn.q_proj.B and 6 other"):
        handout.run(handout.make(adapter=open_tap))
    handout.run(handout.make(adapter=open_tap, round=1))
    handout.run(handout.make(adapter=open_tap, continues=Ancestor(run="old", round=1, rounds=1)))


@pytest.mark.parametrize("rank", [16, 4])
def test_an_honest_emulator_and_its_start_are_trained_on_at_every_rank(handout: Handout, rank: int) -> None:
    change = handout.run(handout.make(tier=f"r{rank}", training={"gradient_clipping": 1.0, "learning_rate": 1e-3}))
    assert change["5.mlp.up_proj.A"].shape == (rank, 32)
    (inspected, _) = handout.events
    assert inspected["event"] == "inspected" and 30 < inspected["perplexity"] < 300


def test_an_adapter_of_another_rank_than_the_tasks_is_refused_and_so_is_a_rank_above_the_methods(
    handout: Handout,
) -> None:
    with pytest.raises(MismatchError, match=r"proj.A is F32 \[16, \d+\], expected F32 \[4, "):
        handout.run(handout.make(told="r4"))
    with pytest.raises(InputError, match="there is no tier 'r17', only r1 to r16"):
        handout.run(handout.make(told="r17"))


@pytest.mark.parametrize(("name", "settings"), [("lora", {}), ("lora", {"init": "pissa"}), ("blocks", {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_is_the_same_for_owner_and_site_in_the_sites_precision(
    site_files: Path, name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    method = methods.make(name, settings)
    owners = method.start(stored(site_files), TOP.places, seed=3)
    sites = method.start(stored(site_files).to(dtype), TOP.places, seed=3)
    assert strange_start(owners, sites, dtype) == []
    key = sorted(owners)[0]
    other = owners | {key: owners[key] * 1.02}
    assert strange_start(other, sites, dtype)[0].startswith("the run's first adapter is not the start")
    assert key in strange_start(other, sites, dtype)[0]


def not_finite(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")


@pytest.mark.parametrize("suspicious", ["refuse", "warn"])
def test_a_tensor_that_is_not_finite_or_has_another_shape_is_refused_by_name(handout: Handout, suspicious: str) -> None:
    with pytest.raises(MismatchError, match=r"tensor .*layers\.2\.mlp\.up_proj\..*weight holds values that are not"):
        handout.run(handout.make(model=not_finite, suspicious=suspicious))
    key = "5.mlp.gate_proj.A"
    spoilt: list[tuple[Change, str]] = [
        (lambda adapter: adapter[key][0].fill_(torch.inf), "holds 32 values that are not finite"),
        (lambda adapter: adapter.update({key: adapter[key][:, 1:]}), r"is F32 \[16, 31\], expected F32 \[16, 32\]"),
        (lambda adapter: adapter.pop(key), "is missing"),
    ]
    for spoil, words in spoilt:
        with pytest.raises(MismatchError, match=f"adapter to start from: tensor {key} {words}"):
            handout.run(handout.make(adapter=spoil, suspicious=suspicious))


def sure_and_wrong(model: Any) -> None:
    model.model.norm.weight.data.fill_(-30.0)  # away from the token that was read, as the head is tied


def test_worse_than_guessing_is_a_warning_and_the_policys_own_bound_refuses(handout: Handout) -> None:
    handout.run(handout.make(model=sure_and_wrong))
    perplexity, warnings = handout.events[0]["perplexity"], handout.events[0]["warnings"]
    assert perplexity > 64 and "worse than guessing" in warnings[0]
    handout.run(handout.make(model=sure_and_wrong, max_emulator_perplexity=1.01 * perplexity))
    bound = handout.make(model=sure_and_wrong, max_emulator_perplexity=0.99 * perplexity)
    with pytest.raises(RefusedError, match=rf"\(max_emulator_perplexity\): .* text is {perplexity:.4g}, more than"):
        handout.run(bound)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_made_of_weights_may_differ_in_its_last_digits_and_no_further(
    site_files: Path, tmp_path: Path, init: str
) -> None:
    method = methods.make("lora", {"init": init})
    assert is_derived(method) and not is_derived(methods.make("lora", {}))
    own = method.start(stored(site_files), TOP.places, seed=3)

    def sent(factor: float, end: str) -> dict[str, torch.Tensor]:
        changed = {key: value * factor if key.endswith(end) else value for key, value in own.items()}
        tensors.save(tmp_path / "adapter", changed)
        return receive(tmp_path / "adapter", method, own)

    rounded = sent(1 + 1e-6, "0")
    assert not torch.equal(rounded["5.mlp.up_proj.A0"], own["5.mlp.up_proj.A0"])
    assert strange_start(rounded, own, torch.float32, derived=True) == []
    assert strange_start(rounded, own, torch.float32) != []
    with pytest.raises(MismatchError, match=r"tensor 5.*B0 is not the one that the emulator's weights give"):
        sent(1.01, "B0")
    assert "A and 6 other" in strange_start(sent(1.01, ".A"), own, torch.float32, derived=True)[0]
