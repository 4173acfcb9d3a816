"""Answers of many adapters in one batch: those of each merged alone, whoever else is answered."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite.emulator.methods import make
from offsite.emulator.plug import load
from offsite.emulator.serving import engine as engines
from offsite.emulator.serving.engine import Busy, Engine, Piece, Request
from offsite.emulator.serving.shelf import Shelf
from offsite.emulator.serving.slots import Slots

RANKS = {"a": 2, "b": 3, "c": 2, "d": 1}
MODULES = ["q_proj", "v_proj", "down_proj"]


def publish(folder: Path, base: Any, *, rank: int, seed: int, modules: Any = MODULES) -> Path:
    """LoRA of several scales that changes every answer."""
    method, drawn = make("lora", {"rank": rank, "alpha": 3.0, "modules": modules}), torch.Generator().manual_seed(seed)
    start = method.start(base, {0: 0, 4: 4}, seed=0)
    adapter = {key: value + 0.4 * torch.randn(value.shape, generator=drawn) for key, value in start.items()}
    method.export(folder, adapter, base=base, base_name="base")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where adapters are kept that were published once."""
    return tmp_path_factory.mktemp("published")


@pytest.fixture
def shelf(tiny: Any, written: Path, tmp_path: Path) -> Shelf:
    """Four adapters of several ranks, and two that answer together."""
    for seed, (name, rank) in enumerate(RANKS.items()):
        if not (written / name).exists():
            publish(written / name / "adapter", tiny(), rank=rank, seed=seed)
    shutil.copytree(written, tmp_path / "shelf")
    for part, name in (("adapter", "a"), ("experts/old", "b")):
        shutil.copytree(written / name / "adapter", tmp_path / "shelf" / "both" / part)
    combine(tmp_path / "shelf" / "both", "max")
    return Shelf(tmp_path / "shelf")


def combine(folder: Path, how: str) -> None:
    document = {"combine": how, "experts": {"new": "adapter", "old": "experts/old"}}
    (folder / "ensemble.json").write_text(json.dumps(document))


class Answer(list[Any]):
    """What an engine tells of a request."""

    def __init__(self, engine: Engine, prompt: list[int], folders: tuple[Path, ...] = (), **how: Any) -> None:
        self.request = Request(prompt, folders, how.pop("most", 6), self.append, **how)
        engine.submit(self.request)

    @property
    def tokens(self) -> list[int]:
        return [piece.token for piece in self]


def prompt(number: int) -> list[int]:
    return torch.randint(3, 90, (3 + 2 * number,), generator=torch.Generator().manual_seed(number)).tolist()


def greedy(model: Any, prompt: list[int], most: int = 6) -> list[int]:
    """The likeliest tokens, each from the whole text anew."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(most):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def serve(tiny: Any, shelf: Shelf) -> Callable[..., Engine]:
    def make(*, slots: int = 4, **how: Any) -> Engine:
        known = [folder for name in RANKS for folder in shelf.folders(name)]
        model, size = tiny(), slots * 2 * 3 * 4 * (32 + 32 + 32 + 16 + 48 + 32)  # layers, rank, bytes, the maps' sides
        return Engine(model, Slots(model, known, size=size), ends=frozenset(how.pop("ends", ())), **how)

    return make


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def test_a_mixed_batch_answers_as_each_adapter_merged_alone_does(serve: Any, shelf: Shelf, tiny: Any) -> None:
    engine = serve()
    asked = [(number, name) for number, name in enumerate(["a", "", "b", "c", "a", "d"])]
    answers = [Answer(engine, prompt(number), shelf.folders(name)) for number, name in asked]
    finish(engine)
    for (number, name), answer in zip(asked, answers, strict=True):
        model = load(tiny(), shelf.folders(name)[0]).merge_and_unload() if name else tiny()
        assert answer.tokens == greedy(model, prompt(number)), name
        assert [piece.end for piece in answer] == [""] * 5 + ["length"]
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers), "the adapters are told apart"


def test_who_comes_and_goes_meanwhile_changes_no_answer(serve: Any, shelf: Shelf) -> None:
    alone = serve()
    own = Answer(alone, prompt(2), shelf.folders("b"), most=12)
    finish(alone)
    engine = serve(rows=3)
    mine = Answer(engine, prompt(2), shelf.folders("b"), most=12)
    others = [Answer(engine, prompt(5), shelf.folders("a"), most=2), Answer(engine, prompt(0), most=30)]
    engine.step()
    others += [Answer(engine, prompt(number), shelf.folders(name), most=4) for number, name in ((6, "d"), (1, "c"))]
    engine.step()
    others[1].request.over = True  # who asked wants no more
    finish(engine)
    assert mine.tokens == own.tokens
    assert [len(one) for one in others] == [2, 2, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2", "opt", "bloom"])
def test_other_families_go_on_as_from_the_whole_text(family: str, tiny: Any, tmp_path: Path) -> None:
    folder = publish(tmp_path / "one", tiny(family), rank=2, seed=3, modules="all-linear")
    model = tiny(family)
    engine = Engine(model, Slots(model, [folder], size=1 << 30), ends=frozenset())
    answers = [Answer(engine, prompt(4), (folder,)), Answer(engine, prompt(1))]
    finish(engine)
    assert answers[0].tokens == greedy(load(tiny(family), folder).merge_and_unload(), prompt(4))
    assert answers[1].tokens == greedy(tiny(family), prompt(1))


def test_adapters_are_paged_in_and_out_of_two_slots(serve: Any, shelf: Shelf, monkeypatch: Any) -> None:
    engine, free = serve(slots=2), serve()
    read = list[str]()
    original = Slots._read
    monkeypatch.setattr(Slots, "_read", lambda self, *at: (read.append(at[0].parent.name), original(self, *at))[1])
    names = ["a", "b", "a", "c", "a", "d", "b"]
    wanted = [Answer(free, prompt(number), shelf.folders(name)) for number, name in enumerate(names)]
    finish(free)
    read.clear()
    answers = [Answer(engine, prompt(number), shelf.folders(name)) for number, name in enumerate(names)]
    finish(engine)
    assert [one.tokens for one in answers] == [one.tokens for one in wanted]
    assert read == ["a", "b", "c", "d", "b"], "the one that was asked for last stays"


def test_an_adapter_that_is_published_anew_is_read_anew(serve: Any, shelf: Shelf, tiny: Any) -> None:
    engine = serve()
    (folder,) = shelf.folders("a")
    before = Answer(engine, prompt(1), (folder,))
    finish(engine)
    weights = folder / "adapter_model.safetensors"
    save_file(
        {name: -value for name, value in load_file(weights).items() if "lora_A" in name}
        | {name: value for name, value in load_file(weights).items() if "lora_B" in name},
        weights,
    )
    os.utime(weights, ns=(1, 1))
    after = Answer(engine, prompt(1), (folder,))
    finish(engine)
    assert after.tokens == greedy(load(tiny(), folder).merge_and_unload(), prompt(1)) != before.tokens


def test_adapters_that_answer_together_are_rows_of_one_answer(serve: Any, shelf: Shelf, tiny: Any) -> None:
    engine = serve()
    answers = [Answer(engine, prompt(3), shelf.folders(name)) for name in ("a", "both", "b")]
    finish(engine)
    both = shelf.folders("both")
    assert answers[1].tokens == greedy(load(tiny(), both[0].parent), prompt(3))
    assert answers[0].tokens != answers[1].tokens != answers[2].tokens


def test_what_is_drawn_depends_on_the_seed_and_stays_within_top_p(serve: Any) -> None:
    engine = serve()
    hot = {"temperature": 5.0, "most": 8}
    same, again, other = (Answer(engine, prompt(1), seed=seed, **hot) for seed in (1, 1, 2))
    likeliest, narrow = Answer(engine, prompt(1), most=8), Answer(engine, prompt(1), top_p=1e-6, **hot)
    finish(engine)
    assert same.tokens == again.tokens != other.tokens
    assert narrow.tokens == likeliest.tokens


def test_an_answer_ends_at_a_token_that_ends_it(serve: Any) -> None:
    plain = serve()
    whole = Answer(plain, prompt(1))
    finish(plain)
    last = whole.tokens[2]
    engine = serve(ends=[last])
    answer = Answer(engine, prompt(1))
    finish(engine)
    assert answer[-1] == Piece(last, "stop") and len(answer) == whole.tokens.index(last) + 1


def test_what_cannot_be_answered_is_said_to_who_asked_and_others_are_answered(
    serve: Any, shelf: Shelf, tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    engine = serve(slots=1, waiting=3)
    with pytest.raises(ValueError, match="60 tokens, and an answer of up to 6 goes beyond the 64"):
        Answer(engine, [5] * 60)
    with pytest.raises(ValueError, match="2 adapters that answer together are more than"):
        Answer(engine, [5], shelf.folders("both"))
    with pytest.raises(ValueError, match="no token"):
        Answer(engine, [])
    strange = publish(tmp_path / "strange", tiny(), rank=1, seed=0, modules=["up_proj"])
    large = publish(tmp_path / "large", tiny(), rank=9, seed=0)
    lost = [Answer(engine, [5], (folder,)) for folder in (strange, large)]
    good = Answer(engine, prompt(1))
    with pytest.raises(Busy, match="3 requests are waiting"):
        Answer(engine, [5])
    finish(engine)
    assert "no adapter had at the start" in str(lost[0][0]) and "its rank is 9" in str(lost[1][0])
    assert len(good) == 6 and not isinstance(good[0], Exception)
    monkeypatch.setattr(engines.batch, "begin", lambda *_: 1 / 0)
    broken = Answer(engine, prompt(1))
    finish(engine)
    assert isinstance(broken[0], ZeroDivisionError)
    monkeypatch.undo()
    healed = Answer(engine, prompt(1))
    finish(engine)
    assert healed.tokens == good.tokens


def test_a_shelf_has_what_runs_have_published(shelf: Shelf, tiny: Any, tmp_path: Path) -> None:
    assert shelf.names() == ["a", "b", "both", "c", "d"]
    combine(tmp_path / "shelf" / "both", "route")
    assert shelf.names() == ["a", "b", "both:new", "both:old", "c", "d"]
    assert shelf.folders("both:old") == (tmp_path / "shelf" / "both" / "experts" / "old",)
    assert shelf.folders("both") == shelf.folders("../shelf/a") == ()
    method = make("ssf", {})
    method.export(tmp_path / "shelf" / "other", method.start(tiny(), {0: 0}, seed=0), base=tiny(), base_name="base")
    with pytest.raises(ValueError, match="only LoRA is served beside other adapters, .* --as merged"):
        shelf.folders("other")
