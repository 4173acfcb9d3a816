"""What an update must be to be let in, as a function of files and documents."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.kernels.schema import Field, Rule, Schema, Tensors, settle
from offsite.protos import tensors, upload
from offsite.protos.documents import canonical
from offsite.protos.errors import MismatchError
from offsite.protos.spec import Choice, LocalTraining, TaskSpec, UpdateMetrics
from offsite.protos.upload.admission import admit, admit_metrics, described
from offsite.protos.upload.admission import judge as judge_held
from offsite.protos.upload.change import Change

DIGEST = "sha256:" + "0" * 64
SCHEMA: Schema = {
    "0.q.A": Field("F32", (None, 3), Rule.PRODUCT, "0.q"),
    "0.q.B": Field("F32", (4, None), Rule.PRODUCT, "0.q"),
    "0.index": Field("I32", (2,), Rule.FIXED, below=9),
}
INDEX = torch.tensor([8, 0], dtype=torch.int32)
START = {"0.q.A": torch.arange(6.0).reshape(2, 3), "0.q.B": torch.zeros(4, 2), "0.index": INDEX}
TRAINED = START | {"0.q.B": torch.ones(4, 2)}  # changed by a norm of the root of 8
ORIGIN = {"broadcast": DIGEST, "method_hash": DIGEST}
TASK = TaskSpec(
    run="run-1",
    round=0,
    rounds=1,
    site="clinic",
    attempt=0,
    base=DIGEST,
    manifest=DIGEST,
    manifest_size=1,
    adapter=DIGEST,
    adapter_size=1,
    update_size=1,
    method=Choice(name="lora"),
    method_hash=DIGEST,
    training=LocalTraining(steps=4, batch_size=2, learning_rate=1e-3),
)
NOISE, TOP = (Choice(name="noise"),), (Choice(name="top"),)

Admit = Callable[..., None]


@pytest.fixture
def admitted(tmp_path: Path) -> Admit:
    """Write an update beside its broadcast and judge it."""

    def judge(update: Tensors, *, about: Any = ORIGIN, max_norm: float = 10.0, chain: tuple[Choice, ...] = ()) -> None:
        tensors.save(tmp_path / "broadcast", START)
        metadata = {} if about is None else {"offsite": about if isinstance(about, str) else canonical(about).decode()}
        tensors.save(tmp_path / "update", update, metadata=metadata)
        task = replace(TASK, upload=chain)
        settled = settle(SCHEMA, {name: tensor.shape for name, tensor in START.items()})
        try:
            admit(tmp_path / "update", task, SCHEMA, broadcast=tmp_path / "broadcast", max_norm=max_norm)
        except MismatchError as error:
            if "expected sha256" not in str(error):  # of where it comes from, which only a file says
                with pytest.raises(MismatchError, match=f"^{re.escape(str(error))}$"):
                    verdict(update, settled, chain, max_norm)
            raise
        verdict(update, settled, chain, max_norm)

    def verdict(update: Tensors, settled: Schema, chain: tuple[Choice, ...], max_norm: float) -> None:
        """In memory it is the same."""
        held, start, what = tensors.Held(update), tensors.Held(START), described(TASK)
        judge_held(held, start, settled, upload.make(chain), max_norm=max_norm, what=what)

    return judge


def test_what_was_asked_for_is_let_in(admitted: Admit) -> None:
    admitted(TRAINED)
    admitted(TRAINED, max_norm=8**0.5)
    admitted(START, max_norm=1e-9)


def test_of_a_sparse_matrix_the_change_is_that_of_the_matrix_and_its_index_rises(tmp_path: Path) -> None:
    schema: Schema = {
        "0.at": Field("I32", (None,), Rule.UNION, "0", below=9),
        "0.values": Field("F32", (None,), Rule.UNION, "0"),
        "1.norm": Field("F32", (2,), Rule.MEAN),
    }
    start = {"0.values": torch.tensor([3.0, 1.0]), "1.norm": torch.zeros(2)}
    start["0.at"] = torch.tensor([2, 5], dtype=torch.int32)
    tensors.save(tmp_path / "broadcast", start)

    def judge(at: list[int], values: list[float], chain: tuple[Choice, ...] = (), *, norm: float = 0.0) -> None:
        update = {"0.at": torch.tensor(at, dtype=torch.int32), "0.values": torch.tensor(values)}
        update["1.norm"] = torch.tensor([1.0, 0.0])
        if chain:
            settled = settle(schema, {name: tensor.shape for name, tensor in start.items()})
            packed = upload.pack(upload.make(chain), update, start, settled, key=bytes(32))
            update = {name: tensor for part in packed for name, tensor in part.update.items()}
        tensors.save(tmp_path / "update", update, metadata={"offsite": canonical(ORIGIN).decode()})
        task = replace(TASK, upload=chain)
        admit(tmp_path / "update", task, schema, broadcast=tmp_path / "broadcast", max_norm=norm + 1e-6)
        with pytest.raises(MismatchError, match="changed by a norm of"):
            admit(tmp_path / "update", task, schema, broadcast=tmp_path / "broadcast", max_norm=norm - 1e-6)

    judge([2, 5], [3.0, 1.0], norm=1.0)
    judge([2, 7], [3.0, 1.0], norm=3**0.5)  # one entry goes, one comes
    judge([0, 5], [0.0, 1.0], norm=10**0.5)
    for chain in ((), NOISE):
        with pytest.raises(MismatchError, match="an entry twice, or not in order"):
            judge([5, 2], [3.0, 1.0], chain)
        with pytest.raises(MismatchError, match=r"0.at holds 1 values that are not in 0..8"):
            judge([2, 9], [3.0, 1.0], chain)
    exact = (Choice(name="noise", settings={"share": 1e-9}),)  # so little that fp32 keeps none of it
    judge([2, 7], [3.0, 1.0], exact, norm=3**0.5)


def test_of_bits_the_change_is_the_root_of_how_many_differ_which_has_no_bound_and_none_is_set_beyond_them(
    tmp_path: Path,
) -> None:
    schema: Schema = {"0.mask": Field("U8", (2,), Rule.VOTE, bits=11), "1.norm": Field("F32", (2,), Rule.MEAN)}
    start = {"0.mask": torch.tensor([255, 7], dtype=torch.uint8), "1.norm": torch.zeros(2)}
    tensors.save(tmp_path / "broadcast", start)

    def judge(mask: list[int], norm: float) -> None:
        update = {"0.mask": torch.tensor(mask, dtype=torch.uint8), "1.norm": torch.tensor([2.0, 0.0])}
        tensors.save(tmp_path / "update", update, metadata={"offsite": canonical(ORIGIN).decode()})
        reached = admit(tmp_path / "update", TASK, schema, broadcast=tmp_path / "broadcast", max_norm=2.0)
        with pytest.raises(MismatchError, match="changed by a norm of 2, the run allows 1.9"):
            admit(tmp_path / "update", TASK, schema, broadcast=tmp_path / "broadcast", max_norm=1.9)
        held = judge_held(tensors.Held(update), tensors.Held(start), schema, [], max_norm=9.0, what="it")
        assert reached == held == pytest.approx(norm)

    judge([255, 7], 2.0)
    judge([0, 7], 12**0.5)  # eight bits, and the norm of what is no bit
    judge([254, 3], 6**0.5)
    with pytest.raises(MismatchError, match="0.mask has bits beyond its 11 that are not zero"):
        judge([255, 15], 2.0)


def test_of_codes_the_change_is_that_of_the_values_they_stand_for(tmp_path: Path) -> None:
    schema: Schema = {
        "0.codes": Field("U8", (2,), Rule.REQUANTISE, "0", bits=11),
        "0.line": Field("F32", (2,), Rule.REQUANTISE, "0"),
    }
    start = {"0.codes": torch.tensor([255, 7], dtype=torch.uint8), "0.line": torch.tensor([0.0, 1.0])}
    tensors.save(tmp_path / "broadcast", start)

    def judge(codes: list[int], line: list[float], norm: float) -> None:
        update = {"0.codes": torch.tensor(codes, dtype=torch.uint8), "0.line": torch.tensor(line)}
        tensors.save(tmp_path / "update", update, metadata={"offsite": canonical(ORIGIN).decode()})
        assert admit(
            tmp_path / "update", TASK, schema, broadcast=tmp_path / "broadcast", max_norm=norm + 1e-6
        ) == pytest.approx(norm)

    judge([255, 7], [0.0, 1.0], 0.0)
    judge([255, 7], [3.0, 1.0], 3 * 11**0.5)
    judge([252, 7], [0.0, 1.0], 2 * 0.6745 * 2**0.5)  # two codes are others
    judge([255, 7], [0.0, 3.0], 2 * 0.6745 * 11**0.5)
    with pytest.raises(MismatchError, match="0.line holds 1 values that are not finite"):
        judge([255, 7], [0.0, float("inf")], 0.0)
    with pytest.raises(MismatchError, match="0.codes has bits beyond its 11"):
        judge([255, 8], [0.0, 1.0], 0.0)


def test_an_update_that_was_seen_as_it_came_is_judged_and_not_read_for_its_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(*files: Path) -> float:
        raise AssertionError(f"{files} are read")

    monkeypatch.setattr(tensors, "gap", distance)
    schema = {name: field for name, field in SCHEMA.items() if name != "0.index"}
    start = {name: START[name] for name in schema}
    update, broadcast = tmp_path / "update", tmp_path / "broadcast"
    tensors.save(broadcast, start)

    def judge(factor: torch.Tensor) -> float:
        tensors.save(update, start | {"0.q.B": factor}, metadata={"offsite": canonical(ORIGIN).decode()})
        change = Change(broadcast)
        change.add(update.read_bytes())
        change.close()
        return admit(update, TASK, schema, broadcast=broadcast, max_norm=10.0, change=change)

    assert judge(torch.ones(4, 2)) == pytest.approx(8**0.5)
    with pytest.raises(MismatchError, match="changed by a norm of 283, the run allows 10"):
        judge(torch.full((4, 2), 100.0))
    with pytest.raises(MismatchError, match="tensor 0.q.B holds 8 values that are not finite"):
        judge(torch.full((4, 2), float("nan")))


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"0.q.B": TRAINED["0.q.B"], "0.index": INDEX}, "tensor 0.q.A is missing"),
        (TRAINED | {"0.index": INDEX.long()}, r"tensor 0.index is I64 \[2\], expected I32 \[2\]"),
        (TRAINED | {"0.index": INDEX + 1}, "tensor 0.index holds 1 values that are not in 0..8"),
        (TRAINED | {"0.index": INDEX.flip(0)}, "tensor 0.index is not the one that all sites have"),
        (TRAINED | {"0.q.B": torch.zeros(2, 4)}, r"tensor 0.q.B is F32 \[2, 4\], expected F32 \[4, 2\]"),
        (TRAINED | {"0.q.B": torch.full((4, 2), float("nan"))}, "tensor 0.q.B holds 8 values that are not finite"),
        (TRAINED | {"0.q.B": torch.full((4, 2), 100.0)}, "changed by a norm of 283, the run allows 10"),
    ],
)
def test_what_is_something_else_is_named(admitted: Admit, update: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(MismatchError, match=f"update of clinic, round 1: {words}"):
        admitted(update)


def packed(chain: tuple[Choice, ...] = NOISE) -> Tensors:
    schema = settle(SCHEMA, {key: tensor.shape for key, tensor in START.items()})
    parts = upload.pack(upload.make(chain), TRAINED, START, schema, key=bytes(32))
    return {key: tensor for part in parts for key, tensor in part.update.items()}


def test_what_stages_packed_is_judged_by_their_schema_and_its_norm_by_what_comes_of_it(admitted: Admit) -> None:
    admitted(packed(), chain=NOISE)
    admitted(packed(), chain=NOISE, max_norm=2.9)
    with pytest.raises(MismatchError, match="changed by a norm of 2.84, the run allows 2.7"):
        admitted(packed(), chain=NOISE, max_norm=2.7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"0.q.B": torch.full((4, 2), float("inf"))}, "tensor 0.q.B holds 8 values that are not finite"),
        ({"0.q.B": torch.ones(4, 2).half()}, r"tensor 0.q.B is F16 \[4, 2\], expected F32"),
        ({"0.index": INDEX.flip(0)}, "tensor 0.index is not the one that all sites have"),
        ({"0.q.B.index": INDEX.clone()}, "tensor 0.q.B.index was not asked for"),
    ],
)
def test_what_no_stage_can_have_packed_is_named(admitted: Admit, changes: Tensors, words: str) -> None:
    with pytest.raises(MismatchError, match=f"update of clinic, round 1: {words}"):
        admitted(packed() | changes, chain=NOISE)


def test_what_a_stage_cannot_unpack_is_named(admitted: Admit, top: Any) -> None:
    sent = packed(TOP)
    admitted(sent, chain=TOP)
    with pytest.raises(MismatchError, match="update of clinic, round 1: tensor 0.q.B.index names an entry twice"):
        admitted(sent | {"0.q.B.index": torch.zeros(2, dtype=torch.int32)}, chain=TOP)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (ORIGIN | {"broadcast": "sha256:" + "1" * 64}, f"its broadcast is sha256:1+, expected {DIGEST}"),
        (ORIGIN | {"method_hash": "sha256:" + "1" * 64}, "its method_hash is sha256:1+, expected"),
        (None, "its broadcast is None"),
        ("[]", "its broadcast is None"),
        ("{", "its broadcast is None"),
    ],
)
def test_what_comes_from_elsewhere_is_named(admitted: Admit, about: Any, words: str) -> None:
    with pytest.raises(MismatchError, match=f"update of clinic, round 1: {words}"):
        admitted(TRAINED, about=about)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"examples": 9}, "says it saw 9 examples, 8 at most were asked for"),
        ({"losses": (1.0, 1.0, 1.0)}, "tells 3 losses of 4 steps"),
    ],
)
def test_a_site_cannot_say_that_it_did_more_than_was_asked(metrics: dict[str, Any], words: str) -> None:
    told: dict[str, Any] = {"examples": 8, "tokens": 1, "loss": 1.0, "losses": (1.0,) * 4, "engine": "none"}
    admit_metrics(UpdateMetrics(**told), TASK)
    admit_metrics(UpdateMetrics(**told | {"losses": ()}), TASK)
    with pytest.raises(MismatchError, match=f"update of clinic, round 1: {words}"):
        admit_metrics(UpdateMetrics(**told | metrics), TASK)
