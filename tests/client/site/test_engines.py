import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.client.site.engines import ENGINES
from offsite.client.site.job import TrainerJob
from offsite.client.site.launch import launch
from offsite.client.site.training import train
from offsite.coordinator.bundles import building
from offsite.emulator import bundle, methods
from offsite.emulator.bundle import Layout
from offsite.emulator.methods.base import Choosing
from offsite.emulator.modality import score
from offsite.emulator.outline import Outline
from offsite.emulator.tuning.adapting import adapt, adapted
from offsite.kernels.schema import settle
from offsite.protos import tensors
from offsite.protos.errors import InputError
from offsite.protos.processes.forks import ForkServer
from offsite.protos.recipes import parse, parse_one
from offsite.protos.spec import Choice

from .ranks import SPREAD, TRAINING, Loaded

Jobs = Any
TWO = {"processes": 2, "threads": 2}  # one server for all tests of two processes
OUTLINE = Outline(layers=(0, 2, 3, 5), trainable=(0, 5))  # of the emulator on disk

SPSA = "spsa-gc(draws=2,alpha=0.0)"  # of order zero


def agree(start: Any, job: TrainerJob, reference: TrainerJob, folder: Path) -> None:
    """Run a job in processes of its own and hold its losses and its adapter against one process of plain torch."""
    loaded = Loaded(reference)
    engine = loaded.engine()
    losses = [engine.step(batch) for batch in loaded.batches]
    expected = engine.gather(loaded.method, loaded.places)
    assert losses[-1] < losses[0] and len(set(losses)) == len(losses)
    told = [event["loss"] for event in start(job, folder).events() if event["event"] == "step"]
    assert told == pytest.approx(losses, abs=1e-4)
    update = tensors.load(Path(job.out) / "update.safetensors")
    assert update.keys() == expected.keys()
    for key, value in update.items():
        assert value.shape == loaded.broadcast[key].shape
        assert float((value - loaded.broadcast[key]).norm()) > 1e-2
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=0)


@pytest.mark.slow(alone=True)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_at_every_zero_stage_train_as_one_plain_process(
    start: Any, job: Jobs, tmp_path: Path, stage: int
) -> None:
    agree(
        start,
        job(name="deepspeed", zero_stage=stage, training=TRAINING, **TWO),
        job(training=TRAINING),
        tmp_path / "task",
    )


@pytest.mark.slow(alone=True)
def test_two_plain_processes_train_as_one(start: Any, job: Jobs, tmp_path: Path) -> None:
    uneven = TRAINING | {"batch_size": 5}
    agree(start, job(training=uneven, **TWO), job(training=uneven), tmp_path / "task")


@pytest.mark.slow
def test_two_processes_measure_as_one_each_its_own_batches(start: Any, job: Jobs, tmp_path: Path) -> None:
    one = job(**TWO)
    moments = Choice(name="moments")
    method: Any = methods.make(moments.name, moments.settings)
    layout = bundle.described(one.manifest)
    model, _ = bundle.load(Path(one.bundle), layout=layout, dtype=torch.float32)
    zeros = method.start(model, layout.outline.places, seed=0)
    tensors.save(tmp_path / "zeros", zeros)
    one = replace(one, adapter=str(tmp_path / "zeros"), task=replace(one.task, method=moments))
    loaded = Loaded(one)
    losses = [method.measure(loaded.model, loaded.places, batch) for batch in loaded.batches]
    told = [event["loss"] for event in start(one, tmp_path / "task").events() if event["event"] == "step"]
    assert told == pytest.approx(losses[::2], abs=1e-4), "those of the first process"
    update, expected = tensors.load(Path(one.out) / "update.safetensors"), method.state(loaded.model, loaded.places)
    assert update.keys() == zeros.keys() and all(bool(value.any()) for value in update.values())
    for key, value in update.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize(
    ("dropout", "optimiser"),
    [(0.0, "adamw"), (0.3, "adamw"), (0.3, "natural-galore(rank=2,history=3,every=4)"), (0.3, SPSA)],
)
def test_the_owner_adapts_as_a_site_does_bit_for_bit(job: Jobs, dropout: float, optimiser: str) -> None:
    """Figures that compare an emulator tuned by its owner with what sites train are of one arithmetic."""
    one = job(training=TRAINING | {"optimiser": optimiser})
    spec, site, owner = one.task.training, Loaded(one), Loaded(one)
    for loaded in (site, owner):
        for module in loaded.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
    engine = site.engine()
    torch.manual_seed(spec.seed)
    losses = [engine.step(batch) for batch in site.batches]
    told: list[float] = []
    adapt(owner.model, owner.trained, owner.encoded, spec, tell=lambda step, steps, loss: told.append(loss))
    assert told == losses and len(set(losses)) == len(losses)
    for key, parameter in owner.trained.items():
        assert torch.equal(parameter, site.trained[key]), key


@pytest.mark.slow
@pytest.mark.long
def test_two_nodes_of_the_sites_own_launcher_train_as_one_process(
    job: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = shlex.join([sys.executable, str(Path(__file__).with_name("nodes.py")), str(port)])

    def start(one: TrainerJob, folder: Path) -> Any:
        return launch(one, folder, None)  # type: ignore[arg-type]

    agree(start, job(training=TRAINING, launcher=launcher, **TWO), job(training=TRAINING), tmp_path / "task")


def test_a_launcher_that_is_not_there_is_named(job: Jobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the launcher 'no-such-launcher -n 2' cannot be started: .*No such file"):
        launch(job(launcher="no-such-launcher -n 2"), tmp_path / "task", None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"name": "plain"}, {"name": "deepspeed", "zero_stage": 3}])
def test_two_processes_add_up_pieces_with_few_activations_kept(
    start: Any, job: Jobs, tmp_path: Path, engine: dict[str, Any]
) -> None:
    training = TRAINING | {"batch_size": 5}
    spared = job(training=training, micro_batch=1, checkpointing=True, **engine, **TWO)
    agree(start, spared, job(training=training), tmp_path / "task")


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", [SPSA, "natural-galore(rank=2,history=3)"])
def test_two_plain_processes_train_as_one_by_another_optimiser(
    start: Any, job: Jobs, tmp_path: Path, optimiser: str
) -> None:
    uneven = TRAINING | {"batch_size": 5, "optimiser": optimiser}
    loaded, engines = Loaded(job(training=uneven)), job(training=uneven, **TWO)
    engine = loaded.engine()
    losses = [engine.step(batch) for batch in loaded.batches]
    told = [event["loss"] for event in start(engines, tmp_path / "task").events() if event["event"] == "step"]
    assert told == pytest.approx(losses, abs=1e-4) and len(set(losses)) == len(losses)
    update, expected = (
        tensors.load(Path(engines.out) / "update.safetensors"),
        engine.gather(loaded.method, loaded.places),
    )
    assert update.keys() == expected.keys()
    apart, moved = (
        sum(float((value - other[key]).square().sum()) for key, value in expected.items()) ** 0.5
        for other in (update, loaded.broadcast)
    )
    assert apart < 0.1 * moved, "in all: of single maps the subspace of the largest directions may be in doubt"


@pytest.mark.parametrize("optimiser", ["adamw", SPSA])
def test_what_asks_for_losses_alone_saves_nothing_for_a_way_back(job: Jobs, optimiser: str) -> None:
    loaded = Loaded(job(training={"optimiser": optimiser}))
    engine, saved = loaded.engine(), list[int]()

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = engine.step(loaded.batches[0])
    assert (sum(saved) == 0) == (optimiser == SPSA) and loss > 0
    assert all(bool(value.any()) for value in loaded.trained.values()), "a step was taken, from a B of zeros"


def test_steps_from_losses_alone_lessen_the_loss(job: Jobs) -> None:
    training = {"steps": 8, "learning_rate": 5e-2, "gradient_clipping": 1e6, "optimiser": "spsa-gc(draws=2)"}
    loaded = Loaded(job(training=training))
    engine, before = loaded.engine(), score(loaded.model, loaded.batches[:1]).mean
    for _ in range(8):
        engine.step(loaded.batches[0])
    assert score(loaded.model, loaded.batches[:1]).mean < before - 5e-3


def test_a_site_trains_from_losses_alone_along_other_directions_in_each_round(job: Jobs, tmp_path: Path) -> None:
    one = job(training={"steps": 1, "optimiser": "spsa-gc(draws=1)"}, policy={"min_steps": 1})
    updates = []
    for number, run in enumerate(("first", "again", "next")):
        task = replace(one.task, round=number // 2, rounds=2)
        later = replace(one, task=task, out=str(tmp_path / run))
        train(later, say=lambda event, **fields: None, rendezvous=tmp_path / "rendezvous")
        updates.append(tensors.load(Path(later.out) / "update.safetensors"))
    first, again, following = updates
    for key, value in first.items():
        assert torch.equal(value, again[key]) and not torch.equal(value, following[key])


@pytest.mark.parametrize(
    ("optimiser", "why"), [(SPSA, "takes losses and no gradient"), ("natural-galore", "needs whole matrices")]
)
def test_deepspeed_refuses_an_optimiser_that_it_cannot_feed_and_names_the_engine_that_can_before_it_reads_a_file(
    job: Jobs, tmp_path: Path, optimiser: str, why: str
) -> None:
    one = job(name="deepspeed", training={"optimiser": optimiser})
    nothing = str(tmp_path / "nothing")
    with pytest.raises(InputError, match=f"{why}, .*the engine 'plain' can take its steps"):
        train(
            replace(one, bundle=nothing, data=nothing, adapter=nothing),
            say=lambda event, **fields: None,
            rendezvous=tmp_path / "rendezvous",
        )


@pytest.mark.parametrize("name", ENGINES)
def test_a_batch_smaller_than_the_number_of_processes_is_refused(job: Jobs, name: str) -> None:
    one = job(training={"batch_size": 1}, **TWO)
    with pytest.raises(InputError, match="a batch of 1 sequences cannot be split over 2 processes"):
        ENGINES[name].check(one.task.training, one.engine)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_changes_no_result(start: Any, job: Jobs, tmp_path: Path, stage: int) -> None:
    offloaded = job(name="deepspeed", zero_stage=stage, offload=True, training=TRAINING, **TWO)
    agree(start, offloaded, job(training=TRAINING), tmp_path / "task")


@pytest.mark.slow
def test_deepspeed_needs_no_second_process(start: Any, job: Jobs, tmp_path: Path) -> None:
    agree(start, job(name="deepspeed", zero_stage=3, training=TRAINING), job(training=TRAINING), tmp_path / "task")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """What ranks are forked from that look at the tensors of their model."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    log = tmp_path_factory.mktemp("ranks") / "log"
    with closing(ForkServer("ranks", ["deepspeed"], environment=environment, log=log)) as server:
        yield server


def trained_apart(job: TrainerJob, folder: Path, server: ForkServer) -> dict[str, Any]:
    """Train a job on ranks of their own in a folder; return its outcome, once all have ended well."""
    assert list(launch(job, folder, server).events()) == []
    return dict(json.loads((folder / "outcome.json").read_text()))


def emulator_job(job: Jobs, site_files: Path, folder: Path, *, builders: str, method: str, **engine: Any) -> TrainerJob:
    """Return a job on the same emulator in a format; the first and the last layer train."""
    base, tokenizer = bundle.load(site_files / "bundle", layout=Layout(OUTLINE), dtype="auto")
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    data = site_files / "data.jsonl"
    ends = parse_one("ends(bottom=1,top=1)")
    built = building.build(str(folder / "base"), parse(builders), ends, folder / "bundle", public=data, owner_key=None)
    layout, chosen = bundle.described(built.manifest), parse_one(method)
    model, _ = bundle.load(folder / "bundle", layout=layout, dtype="auto")
    start = methods.make(chosen.name, chosen.settings).start(model, layout.outline.places, seed=0)
    tensors.save(folder / "start.safetensors", start)
    one = job(training=TRAINING | {"learning_rate": 3e-3}, **engine)
    return replace(
        one,
        bundle=str(folder / "bundle"),
        manifest=built.manifest,
        adapter=str(folder / "start.safetensors"),
        task=replace(one.task, method=chosen),
    )


def test_a_site_and_the_owner_choose_by_the_first_batch_what_trains(
    job: Jobs, site_files: Path, tmp_path: Path
) -> None:
    one = emulator_job(job, site_files, tmp_path, builders="whole", method="spiel(share=0.05)")
    train(one, say=lambda event, **fields: None, rendezvous=tmp_path / "rendezvous")
    update = tensors.load(Path(one.out) / "update.safetensors")
    site, owner = Loaded(one), Loaded(one)
    assert isinstance(site.method, Choosing)
    site.method.choose(site.model, site.places, site.batches[0])
    chosen, start = site.method.state(site.model, site.places), site.broadcast
    indices = [key for key in update if key.endswith(".index")]
    assert indices and all(torch.equal(update[key], chosen[key]) for key in indices)
    assert not any(torch.equal(update[key], start[key]) for key in indices)
    model, _ = bundle.load(Path(one.bundle), layout=bundle.described(one.manifest), dtype="auto")
    tuned = adapted(model, owner.method, owner.places, owner.encoded, one.task.training)
    own = owner.method.state(tuned, owner.places)
    assert own.keys() == update.keys() and all(torch.equal(own[key], update[key]) for key in own)


OTHERS = {name: kind for name, kind in methods.METHODS.items() if not kind.needs and not hasattr(kind, "measure")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("builders", "method"),
    [
        ("quantised(block=16)", "lora(rank=4)"),
        ("additive(group=4,bits=4,steps=0)", "blocks"),
        ("sketch", "grids"),
        ("quantised(block=16)", "bottleneck(width=4)"),
        *(("whole", name) for name in {kind.__module__: name for name, kind in OTHERS.items()}.values()),
    ],
)
def test_a_method_of_each_file_trains_alike_where_zero_3_spreads_every_parameter(
    job: Jobs, site_files: Path, tmp_path: Path, ranks: ForkServer, builders: str, method: str
) -> None:
    (tmp_path / "plain").mkdir()
    plain = Loaded(emulator_job(job, site_files, tmp_path / "plain", builders=builders, method=method))
    engine = plain.engine()
    losses = [engine.step(batch) for batch in plain.batches]
    expected = engine.gather(plain.method, plain.places)
    assert losses[-1] < losses[0]

    two = replace(plain.job.engine, name="deepspeed", zero_stage=3, processes=2)
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / SPREAD).touch()
    outcome = trained_apart(replace(plain.job, engine=two), folder, ranks)
    assert outcome["losses"] == pytest.approx(losses, abs=1e-4)
    found = tensors.load(folder / "adapter.safetensors")
    assert found.keys() == expected.keys()
    shapes = {key: tensor.shape for key, tensor in plain.broadcast.items()}
    schema = settle(plain.method.schema(plain.broadcast), shapes)
    for key, value in found.items():
        moves = schema[key].trained and value.is_floating_point()  # an index stays while steps are taken
        assert not moves or float((value - plain.broadcast[key]).norm()) > 2e-4
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_leaves_every_frozen_tensor_as_it_was(
    job: Jobs, tmp_path: Path, ranks: ForkServer, stage: int, precision: str
) -> None:
    one = job(name="deepspeed", zero_stage=stage, training=TRAINING | {"precision": precision})
    outcome = trained_apart(one, tmp_path / "task", ranks)
    assert outcome["frozen"] and outcome["changed"] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_leaves_every_frozen_tensor_as_it_was_and_trains_in_fp32(job: Jobs, precision: str) -> None:
    loaded = Loaded(job(training=TRAINING | {"precision": precision}))
    trained = {id(parameter) for parameter in loaded.trained.values()}
    frozen = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    engine = loaded.engine()
    for batch in loaded.batches:
        engine.step(batch)
    assert {parameter.dtype for parameter in loaded.trained.values()} == {torch.float32}
    names = {name for name, parameter in loaded.model.named_parameters() if id(parameter) in trained}
    assert len(names) == len(loaded.broadcast)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, frozen[name]) == (name not in names), name
