"""What every stage of an upload owes, run over the family's own mapping; another package's, on its defaults."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offsite.kernels.schema import Field, Rule, Schema, Tensors, settle, size_bytes
from offsite.protos import tensors, upload
from offsite.protos.security.draws import derive
from offsite.protos.upload import STAGES, Packed, Stage
from offsite.protos.upload.base import At

KEY = bytes(range(32))
OPEN: dict[str, Schema] = {
    "factors": {
        "0.q.A": Field("F32", (None, 40), Rule.PRODUCT, "0.q"),
        "0.q.B": Field("F32", (50, None), Rule.PRODUCT, "0.q"),
        "1.k.A": Field("F32", (None, 7), Rule.PRODUCT, "1.k"),
        "1.k.B": Field("F32", (9, None), Rule.PRODUCT, "1.k"),
    },
    "layers": {"0.weight": Field("F32", (30, 21), Rule.MEAN), "0.bias": Field("F32", (1,), Rule.MEAN)},
    "sparse": {
        "0.values": Field("F32", (33,), Rule.MEAN, "0"),
        "0.index": Field("I32", (33,), Rule.FIXED, "0", below=99),
    },
}


def given(name: str) -> Schema:
    """A schema of one tier."""
    shapes = {key: tuple(size or 5 for size in field.shape) for key, field in OPEN[name].items()}
    return settle(OPEN[name], shapes)


def change(schema: Schema, *, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randint(field.below, field.shape, generator=generator, dtype=torch.int32)
        if field.below
        else torch.randn(field.shape, generator=generator) * 10.0 ** -len(key)
        for key, field in schema.items()
    }


def rms(values: Tensors) -> float:
    return float(torch.cat([tensor.flatten().double() for tensor in values.values()]).square().mean().sqrt())


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(params=sorted(STAGES))
def stage(request: pytest.FixtureRequest) -> Stage:
    return STAGES.make(request.param, {})


@pytest.fixture(params=sorted(OPEN))
def schema(request: pytest.FixtureRequest, stage: Stage) -> Schema:
    try:
        stage.schema(given(request.param))
    except ValueError as error:
        assert len(str(error)) > 20, "a schema that cannot be packed is refused with a sentence"
        pytest.skip(str(error))
    return given(request.param)


def start_of(schema: Schema) -> Tensors:
    """A broadcast that a change of the schema is the same from, bit for bit."""
    return {key: torch.zeros_like(tensor) for key, tensor in change(schema).items()}


def packed(stage: Stage, schema: Schema, given: Tensors, residual: Tensors) -> Packed:
    """What a chain of one stage makes of a change, a group at a time."""
    parts = list(upload.pack([stage], given, start_of(schema), schema, key=KEY, residual=residual))
    update = {key: tensor for part in parts for key, tensor in part.update.items()}
    return Packed(update, {key: tensor for part in parts for key, tensor in part.residual.items()})


def test_it_declares_what_it_hides_what_it_adds_and_when_it_works(stage: Stage) -> None:
    assert {stage.hides, stage.whole, stage.feedback} <= {True, False} and stage.noise >= 0
    assert "train" in stage.phases and all(isinstance(phase, str) for phase in stage.phases)
    assert not (stage.hides and stage.feedback), "what was left out is known only where one update can be unpacked"


def test_what_it_packs_is_what_its_schema_says_to_the_byte(stage: Stage, schema: Schema, tmp_path: Path) -> None:
    sent, promised = packed(stage, schema, change(schema), {}).update, upload.schema_of([stage], schema)
    tensors.save(tmp_path / "packed", sent)
    tensors.check(tmp_path / "packed", promised, what="packed")
    assert sum(tensor.nbytes for tensor in sent.values()) == size_bytes(promised)


def test_a_group_is_packed_the_same_whatever_is_packed_beside_it(stage: Stage, schema: Schema) -> None:
    if stage.whole:
        pytest.skip("it works on all groups at once")
    together = stage.pack(change(schema), At(schema, derive(KEY, 0, stage.name)))
    alone = packed(stage, schema, change(schema), {}).update
    assert same(together, alone) and stage.schema(schema) == upload.schema_of([stage], schema)


def test_what_was_sent_and_what_stays_are_the_changes_together(stage: Stage, schema: Schema) -> None:
    if not stage.feedback:
        assert upload.residual_of([stage], schema) == {}
        pytest.skip("nothing is fed back")
    promised, start = upload.residual_of([stage], schema), start_of(schema)
    total, wanted, residual = dict(start), dict(start), Tensors()
    for seed in range(3):
        sent, residual = packed(stage, schema, change(schema, seed=seed), residual)
        back = upload.unpack([stage], sent, start, schema)
        total = {key: total[key] + back[key] for key in total}
        wanted = {key: wanted[key] + tensor for key, tensor in change(schema, seed=seed).items()}
        assert {key: tuple(tensor.shape) for key, tensor in residual.items()} == {
            key: field.shape for key, field in promised.items()
        }
    assert any(bool(tensor.any()) for tensor in residual.values()), "it says that it leaves something out"
    for key in (name.removeprefix("0.") for name in promised):
        whole = total[key] + residual[f"0.{key}"]
        assert torch.allclose(whole, wanted[key], rtol=1e-5, atol=1e-6 * float(wanted[key].abs().max()))


def test_repeated_it_packs_the_same_and_leaves_what_it_was_given(stage: Stage, schema: Schema) -> None:
    first = change(schema)
    assert same(stage.pack(first, At(schema, KEY)), stage.pack(change(schema), At(schema, KEY)))
    assert same(first, change(schema))


def test_what_comes_back_is_of_the_schema_and_near_what_was_packed(stage: Stage, schema: Schema) -> None:
    if stage.hides:
        pytest.skip("one update alone does not come back")
    sent = change(schema)
    back = stage.unpack(stage.pack(sent, At(schema, KEY)), At(schema))
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in back.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in sent.items()
    }
    fixed = {key for key, field in schema.items() if field.rule is Rule.FIXED}
    assert all(torch.equal(back[key], sent[key]) for key in fixed)
    moved = {key: sent[key] for key in schema.keys() - fixed}
    assert rms({key: back[key] - sent[key] for key in moved}) < rms(moved), "nearer than if nothing had been sent"


def test_no_change_comes_back_as_none(stage: Stage, schema: Schema) -> None:
    if stage.hides:
        pytest.skip("one update alone does not come back")
    none = {key: tensor if schema[key].below else torch.zeros_like(tensor) for key, tensor in change(schema).items()}
    assert same(stage.unpack(stage.pack(none, At(schema, KEY)), At(schema)), none)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_asking_a_stage_loads_no_tensor_library(name: str) -> None:
    code = f"import sys; from offsite.protos.upload import STAGES; STAGES[{name!r}]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
