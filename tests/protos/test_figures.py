"""The table of figures: each has one name, which stands in no other file."""

import re
from pathlib import Path
from typing import get_args

from offsite.protos.figure_names import USUAL, Named
from offsite.protos.figures import ATTACK, FIGURES, PLUG_IN, title

ROOT = Path(__file__).parent.parent.parent


def test_a_figure_is_named_in_one_file() -> None:
    names = "|".join(FIGURES.keys() - {ATTACK})  # the attack's is also a step's, and a word
    elsewhere = {
        path.relative_to(ROOT).as_posix()
        for package in ("client", "coordinator", "emulator", "kernels")
        for path in (ROOT / package).rglob("*.py")
        if re.search(rf"[\"']({names})[\"':]", path.read_text())
    }
    assert elsewhere == set()


def test_each_figure_can_be_asked_for_by_its_name() -> None:
    assert get_args(Named) == tuple(FIGURES) and USUAL == PLUG_IN


def test_figures_look_different_and_are_read_in_words() -> None:
    assert len({figure.colour for figure in FIGURES.values()}) == len(FIGURES)
    assert title("base_zero_shot") == "base zero-shot" and title("plug_in:2") == "plug-in after round 2"
    assert title("of_another_version") == "of another version"
