"""An adapter that moves to another base by what a model writes; nothing of what it was trained on is there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from offsite.coordinator.commands.transfer import app
from offsite.emulator import methods, modality, placements, zoo
from offsite.emulator.modality.causal_text.encoding import opening
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.transfer.answers import divergence, same_words
from offsite.emulator.transfer.discrimination import best, gains, realness
from offsite.emulator.transfer.move import Move, Moved, move
from offsite.emulator.transfer.sampling import alike, continuations
from offsite.emulator.tuning.loop import Schedule, tune
from offsite.protos.errors import InputError

ROWS = [{"prompt": f"w{a} w{b}", "completion": f"w{a} w80 w{b} w81"} for a in range(10, 26) for b in (30, 40, 50)]
SEEDS, HELD_OUT = ROWS[:6], ROWS[6:22]
SIGNATURE: Any = methods.make("signature", {"buckets": 512})


def rows(path: Path, lines: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def bases(tiny: Any, tokenizer: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with bases that have seen the words, of different depth."""
    folders = []
    for name, depth in (("old", 4), ("new", 5)):
        model = tiny("llama", layers=depth).float()
        text = modality.encode(
            [TextExample("", f"w{at} w{at + 1} w{at + 2}") for at in range(3, 80)], tokenizer, max_length=16
        )
        tune(model, dict(model.named_parameters()), text, Schedule(20, 1e-2))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    return folders[0], folders[1]


@pytest.fixture
def adapter(bases: tuple[Path, Path], tmp_path: Path) -> Path:
    """A folder with LoRA of the old base, trained on rows that nobody has any more."""
    base, tokenizer = zoo.load_base(bases[0], dtype=torch.float32)
    method, places = methods.make("lora", {"rank": 4}), {at: at for at in range(4)}
    model = method.attach(base, places, method.start(base, places, seed=0))
    samples = modality.encode([TextExample(**row) for row in ROWS[22:]], tokenizer, max_length=16)
    tune(model, method.named_parameters(model, places), samples, Schedule(40, 1e-2))
    fresh, _ = zoo.load_base(bases[0], dtype=torch.float32)
    method.export(tmp_path / "adapter", method.state(model, places), base=fresh, base_name="old")
    return tmp_path / "adapter"


def moved(bases: tuple[Path, Path], adapter: Path, **how: Any) -> Moved:
    return move(
        bases[0],
        adapter,
        bases[1],
        [TextExample(**row) for row in SEEDS],
        Move(**{"texts": 48, "steps": 40, "learning_rate": 1e-2, "max_length": 16} | how),
        method=methods.make("lora", {"rank": 4}),
        placement=placements.make("kept", {}),
        held_out=[TextExample(**row) for row in HELD_OUT],
    )


def test_what_is_written_beside_others_is_what_is_written_alone(tiny: Any, tokenizer: Any) -> None:
    model = tiny("llama").float()
    given = [[1, 5], [1, 9, 30, 7], [1, 50, 51]]
    together = continuations(model, tokenizer, given, most=4)
    assert together == [continuations(model, tokenizer, [row], most=4)[0] for row in given]
    drawn = [continuations(model, tokenizer, given, most=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_opening_is_what_training_gives_before_the_answer(tokenizer: Any) -> None:
    example = TextExample("w5 w6", "w7")
    (sample,) = modality.encode([example], tokenizer, max_length=16)
    given = opening(example, tokenizer)
    assert given == sample.input_ids[: len(given)] == (1, 5, 6) and sample.labels[len(given)] == 7


def test_texts_are_new_distinct_and_as_many_as_asked() -> None:
    def write(lists: Sequence[str], seed: int) -> list[str]:
        assert all(text.count("### Example") == 3 and text.endswith("### Example 3\n") for text in lists)
        return [f"text {seed} {at}\n\n### Example 4" if at else "one" for at, _ in enumerate(lists)]

    texts = alike(write, ["one", "two", "three"], count=10, shots=2)
    assert (
        len(set(texts)) == 10
        and "one" not in texts
        and texts == alike(write, ["one", "two", "three"], count=10, shots=2)
    )
    with pytest.raises(ValueError, match="wrote nothing new"):
        alike(lambda lists, _: ["one"] * len(lists), ["one"], count=3)
    with pytest.raises(ValueError, match="no text to write others like"):
        alike(write, [" "], count=3)


def test_the_best_share_is_kept_in_its_order() -> None:
    assert best("abcd", [0.1, 3.0, float("nan"), 2.0], share=0.5) == ["b", "d"]
    assert best("abcd", [0.0] * 4, share=0.1) == ["a"]
    with pytest.raises(ValueError, match="share must be above 0"):
        best("ab", [0.0, 1.0], share=0.0)


def test_a_model_is_no_distance_from_itself_and_its_gains_are_differences_of_means(tiny: Any, tokenizer: Any) -> None:
    base, other = tiny("llama").float(), tiny("qwen2").float()
    samples = modality.encode([TextExample("w5 w6", "w7 w8"), TextExample("w9", "w10")], tokenizer, max_length=16)
    batch = modality.collate(samples)
    assert float(divergence(base)(base, batch).detach()) == pytest.approx(0, abs=1e-6)
    apart = float(divergence(other)(base, batch).detach())
    at = (batch.tensors["labels"][:, 1:] >= 0).flatten()
    logs = [
        functional.log_softmax(modality.run(model, batch).detach()[:, :-1].flatten(0, 1)[at], -1)
        for model in (other, base)
    ]
    assert apart == pytest.approx(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()), rel=1e-5)
    expected = [
        modality.score(base, [modality.collate([one])]).mean - modality.score(other, [modality.collate([one])]).mean
        for one in samples
    ]
    assert gains(other, base, samples) == pytest.approx(expected, rel=1e-4)
    assert same_words(tokenizer, tokenizer)


def measured(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What sites have counted of their rows."""
    rows = SIGNATURE.counts(modality.collate(samples))
    return {f"0.signature.{part}": one.sum(0).double() for part, one in rows.items()}


def test_real_texts_are_told_from_others_by_what_sites_have_counted(tokenizer: Any) -> None:
    def encoded(prompts: Sequence[str]) -> list[Any]:
        return modality.encode([TextExample(one, "w80") for one in prompts], tokenizer, max_length=16)

    real = encoded([row["prompt"] for row in ROWS[::2]])
    written = encoded([row["prompt"] for row in ROWS[1::2]] + [f"w{a} w{a + 1}" for a in range(51, 75)])
    scores = realness(SIGNATURE, measured(real), written)
    assert best(range(48), scores, share=0.5) == [*range(24)] and min(scores[:24]) > max(scores[24:])
    sites = [measured(real[:7]), measured(real[7:])]
    assert realness(SIGNATURE, {key: one + sites[1][key] for key, one in sites[0].items()}, written) == scores
    with pytest.raises(ValueError, match="sums of signature are"):
        realness(SIGNATURE, {"0.signature.terms": torch.zeros(3)}, written)


@pytest.mark.slow(alone=True)
def test_another_base_has_most_of_what_the_old_adapter_gave_and_none_of_its_texts(
    bases: tuple[Path, Path], adapter: Path
) -> None:
    result = moved(bases, adapter)
    assert result.figures is not None and result.figures.old_tuned < result.figures.old_base
    assert result.figures.new_tuned < result.figures.new_base and result.figures.recovered > 0.5, result.figures
    assert 2 * len(result.rows) <= result.written, "some answers are empty"
    assert not {row["prompt"] for row in result.rows} & {row["prompt"] for row in SEEDS}
    again = moved(bases, adapter)
    assert all(torch.equal(tensor, again.adapter[key]) for key, tensor in result.adapter.items())


def test_the_command_writes_an_adapter_that_loads_and_says_what_it_did(
    bases: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    old, new = map(str, bases)
    seeds, exam = rows(tmp_path / "seeds.jsonl", SEEDS), rows(tmp_path / "exam.jsonl", HELD_OUT)
    out = tmp_path / "out"
    asked = [old, str(adapter), new, "--seeds", str(seeds), "--held-out", str(exam), "--out", str(out)]
    short = ["--texts", "8", "--steps", "2", "--max-length", "16", "--method", "lora(rank=2)"]
    base, tokenizer = zoo.load_base(bases[0], dtype=torch.float32)
    counted = measured(modality.encode([TextExample(**row) for row in ROWS[22:]], tokenizer, max_length=16))
    SIGNATURE.export(tmp_path / "counts", counted, base=base, base_name="old")
    codes: Any = methods.make("prototype", {"size": 64})
    codes.export(tmp_path / "codes", codes.start(base, {0: 0}, seed=0), base=base, base_name="old")
    done = CliRunner().invoke(app, [*asked, *short, "--format", "json", "--measured", str(tmp_path / "counts")])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text()) and 0 < 2 * report["learned"] <= report["texts"]
    assert len((out / "texts.jsonl").read_text().splitlines()) == report["learned"]
    assert (out / "adapter" / "adapter_config.json").is_file()
    again = CliRunner().invoke(app, [*asked, *short])
    assert again.exit_code != 0 and "not empty" in str(again.exception)
    other = ["nowhere", str(adapter), new, *asked[3:-1], str(tmp_path / "other"), *short]
    for odd, words in (
        (["--share", "2"], "share must be above 0"),
        (["--temperature", "inf"], "temperature must be at least 0"),
        (["--method", "nothing"], "nothing"),
        (["--seeds", str(tmp_path / "no.jsonl")], "no.jsonl"),
        (["--measured", str(tmp_path / "no")], "expected a published adapter"),
        (["--measured", str(tmp_path / "codes")], "is of the method prototype, by which no text is told"),
    ):
        refused = CliRunner().invoke(app, [*other, *odd])
        assert isinstance(refused.exception, InputError) and words in str(refused.exception), refused.exception
    assert not (tmp_path / "other").exists()
