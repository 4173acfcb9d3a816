"""Plug-ins of other packages: found by their entry points, loaded when asked for, and refused in a sentence."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offsite.kernels.plugins import Plugins

Install = Callable[..., None]
SHAPE = """
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class {cls}:
    size: int = 1
    name: ClassVar[str] = "{name}"

class Loose:
    name = "loose"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A package with a module and entry points, as an installer leaves them."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(package: str, code: str, **points: str) -> None:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{name} = {package}:{place}" for name, place in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[offsite.shapes]", *lines]))

    return make


def shapes() -> Plugins[object]:
    """A family with one plug-in of ours; its class does not matter."""
    return Plugins("shape", {"ours": "fractions:Fraction"}, group="offsite.shapes")


def test_another_package_joins_by_name_and_is_loaded_only_when_asked_for(install: Install) -> None:
    install("shape_round", SHAPE.format(cls="Round", name="round"), round="Round")
    family = shapes()
    assert list(family) == ["ours", "round"] and len(family) == 2 and "round" in family
    assert "shape_round" not in sys.modules
    made = family.make("round", {"size": 3})
    assert type(made) is family["round"] and made.size == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"there is no shape 'rond' \(did you mean round\?\); known are ours, round"):
        family.make("rond", {})


def test_a_package_whose_class_says_too_little_of_itself_is_refused_with_what_it_leaves_out(install: Install) -> None:
    install("shape_terse", SHAPE.format(cls="Terse", name="terse"), terse="Terse")
    family: Plugins[object] = Plugins("shape", {}, group="offsite.shapes", states=("size", "corners", "edges"))
    with pytest.raises(
        ValueError, match=r"'terse' of .*shape_terse 1.2 is unfit: .* does not state its corners, edges$"
    ):
        family.make("terse", {})
    assert family.sound() == {} and len(family.unsound()) == 1


def test_ours_can_be_loaded_before_they_are_asked_for_and_others_are_not(install: Install) -> None:
    install("shape_eager", "raise SystemExit('loaded')", eager="Eager")
    family = shapes()
    family.preload()
    assert [*family._loaded] == ["ours"]
    install("shape_rival", "raise SystemExit('loaded')", ours="Rival")
    family = shapes()
    family.preload()
    assert not family._loaded, "a name that two claim stands for neither"


def test_a_package_that_claims_a_name_of_ours_is_refused_with_it(install: Install) -> None:
    install("shape_thief", "raise SystemExit('loaded')", ours="Thief")
    with pytest.raises(ValueError, match="'ours' is claimed by Offsite itself and by the package shape_thief 1.2; un"):
        shapes().make("ours", {})
    assert "shape_thief" not in sys.modules


def test_two_packages_that_claim_one_name_are_both_named(install: Install) -> None:
    for package in ("shape_one", "shape_two"):
        install(package, SHAPE.format(cls="Round", name="round"), round="Round")
    with pytest.raises(ValueError, match="claimed by the package shape_one 1.2 and by the package shape_two 1.2"):
        shapes().make("round", {})


@pytest.mark.parametrize(
    ("code", "place", "said"),
    [
        ("import nowhere_to_be_found", "Round", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere_to"),
        ("raise RuntimeError('first\\nsecond')", "Round", "cannot be loaded: RuntimeError: first second"),
        (SHAPE.format(cls="Round", name="round"), "Square", "cannot be loaded: AttributeError"),
        (
            SHAPE.format(cls="Round", name="other"),
            "Round",
            "is unfit: shape_bad:Round must be a frozen dataclass",
        ),
        (SHAPE.format(cls="Round", name="round").replace("(frozen=True)", ""), "Round", "must be a frozen dataclass"),
        (SHAPE.format(cls="Round", name="round"), "Loose", "must be a frozen dataclass"),
        (SHAPE.format(cls="Round", name="round") + "made = Round()", "made", "must be a frozen dataclass"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_package_in_one_line(
    install: Install, code: str, place: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "shape_bad", raising=False)
    install("shape_bad", code, round=place)
    with pytest.raises(ValueError, match="shape 'round' of the package shape_bad 1.2 ") as raised:
        shapes().make("round", {})
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_name_that_is_refused_is_answered_with_the_reason_until_another_package_gives_it(install: Install) -> None:
    def family() -> Plugins[object]:
        return Plugins("shape", {}, group="offsite.shapes", refused={"round": "it rolls away"})

    with pytest.raises(ValueError, match="^there is no shape 'round': it rolls away$"):
        family().make("round", {})
    install("shape_round", SHAPE.format(cls="Round", name="round"), round="Round")
    assert family().make("round", {}) and not family().refused


def test_names_are_known_without_a_tensor_library() -> None:
    code = "import sys; from offsite.emulator.catalogue import METHODS; print(*METHODS, 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"lora", "blocks", "False"} <= {*said.stdout.split()}
