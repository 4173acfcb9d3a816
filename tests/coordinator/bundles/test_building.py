"""Building a bundle: from which text, and what is refused before any work."""

from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.bundles import building
from offsite.coordinator.runs.legality import judge
from offsite.emulator import zoo
from offsite.emulator.builders import make
from offsite.emulator.placements import Ends
from offsite.protos.errors import InputError
from offsite.protos.recipes import parse, parse_one
from offsite.protos.spec import RunSpec


def test_builders_look_at_the_calibration_text_if_there_is_one_and_else_at_public_text(
    material: Path, tmp_path: Path
) -> None:
    base, tokenizer = zoo.load_base(material / "model", dtype="auto")
    crash: Any = make("crash", {"keep": 4})

    def looked_at(public: str | None, calibration: str | None) -> tuple[Any, int]:
        public_path, path = (material / f"{name}.jsonl" if name else None for name in (public, calibration))
        found = building.material(public_path, tokenizer, calibration=path)
        return [batch.input_ids.tolist() for batch in found.batches], len(found.samples)

    public, task = looked_at("public", None), looked_at("train", None)
    assert public[0] != task[0]
    assert looked_at("public", "train") == (task[0], public[1])
    assert looked_at(None, "train") == (task[0], 0)
    for folder, stream in (("memory", False), ("streamed", True)):
        built = building.build(
            str(material / "model"),
            parse("crash(keep=4)"),
            parse_one("ends(bottom=1,top=1)"),
            tmp_path / folder,
            public=None,
            calibration=material / "train.jsonl",
            owner_key=None,
            stream=stream,
        )
        text = building.material(None, tokenizer, calibration=material / "train.jsonl").batches
        assert built.manifest.layers == crash.outline(base, text, Ends(1, 1)).layers


@pytest.mark.parametrize(
    ("builders", "texts", "fault"),
    [
        ("crash", {}, "the builder crash looks at how the model reads text: give some as public, or as calibration"),
        ("uniform+distilled", {"calibration"}, "the builder distilled tunes on public text: give some as public"),
        ("additive", {"calibration"}, "the builder additive tunes on public text"),
        ("uniform", {"calibration"}, "calibration is text to look at, and none of uniform does; leave it out"),
    ],
)
def test_a_run_without_the_text_its_builders_need_is_refused(
    material: Path, builders: str, texts: set[str], fault: str
) -> None:
    named = {name: str(material / "public.jsonl") for name in texts}
    with pytest.raises(InputError, match=fault):
        judge(RunSpec(model=str(material / "model"), builders=parse(builders), **named))


@pytest.mark.parametrize(
    ("builders", "texts"),
    [("crash", {"calibration"}), ("additive(steps=0)", {"calibration"}), ("crash+distilled", {"public"})],
)
def test_a_run_with_the_text_its_builders_need_is_taken(material: Path, builders: str, texts: set[str]) -> None:
    judge(
        RunSpec(
            model=str(material / "model"),
            builders=parse(builders),
            trainable=parse_one("ends(bottom=1,top=1)"),
            **{name: str(material / "public.jsonl") for name in texts},
        )
    )
