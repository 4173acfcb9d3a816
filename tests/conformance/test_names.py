"""A plug-in's name stands in its own file, or room, and in its family's mapping: nothing else decides by it."""

import ast
import re
from functools import cache
from pathlib import Path
from runpy import run_path

import pytest

from offsite.coordinator import aggregation, memory
from offsite.emulator import catalogue
from offsite.kernels.plugins import Plugins

ROOT = Path(__file__).parents[2]
FAMILIES: list[Plugins[object]] = [
    aggregation.STRATEGIES,
    memory.MEMORIES,
    catalogue.BUILDERS,
    catalogue.FORMATS,
    catalogue.METHODS,
    catalogue.MODALITIES,
    catalogue.OBJECTIVES,
    catalogue.OPTIMISERS,
    catalogue.PARTS,
    catalogue.PLACEMENTS,
    catalogue.RETENTIONS,
    catalogue.SCHEDULES,
]
NAMES = {name for family in FAMILIES for name in family} - {"none"}  # which much is that is no plug-in
# No words of English: a sentence that has one of them speaks of the plug-in.
WORDS = {
    "additive",
    "all",
    "blocks",
    "bottleneck",
    "ends",
    "grids",
    "half",
    "kept",
    "mean",
    "miss",
    "orthogonal",
    "prototype",
    "replay",
    "road",
    "signature",
    "sketch",
    "spread",
    "surgery",
} | {
    *("constant", "cosine", "linear", "polynomial"),
}
COINED = NAMES - WORDS - {"uniform", "whole"}
MODULES = {family[name].__module__ for family in FAMILIES for name in family} - {
    *("offsite.emulator.placements", "offsite.emulator.schedules"),  # the families' own rooms
}
FAMILY_FILES = {
    "client/plugins.py",
    "emulator/catalogue.py",
    "coordinator/aggregation/__init__.py",
    "coordinator/memory/__init__.py",
}


def files(module: str) -> list[str]:
    """Return the file of a module, or all files of the room that it opens."""
    place = ROOT / module.removeprefix("offsite.").replace(".", "/")
    return [
        str(path.relative_to(ROOT)) for path in (place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")])
    ]


OWN = {
    file: {name for family in FAMILIES for name in family if family[name].__module__ == module}
    for module in MODULES
    for file in files(module)
}

# What else may have a name, and why.
ALLOWED = {
    "protos/spec.py": {
        "adamw",
        "all",
        "constant",
        "crash",
        "ends",
        "lora",
        "low-rank",
        "supervised",
    },  # what a run has that names none
    "coordinator/policy.py": catalogue.BUILDERS.keys() - {"whole"}
    | catalogue.METHODS.keys() - {"blocks", "fisher", "moments", "prototype", "signature"},  # what is safe to allow
    "client/commands/demo.py": {"lae", "lora", "paca"},  # its own choice, and an example in its help
    "emulator/refusals.py": {"mhr"},  # what a type of peft's is that it refuses
    "emulator/methods/fisher.py": {"lora"},  # its own default
    "emulator/builders/quantised.py": {"nf4"},  # its own default
    "coordinator/runs/steps/gating.py": {"dpo"},  # whose rows of two answers a check reads
    "client/demo/play.py": {"crash", "lora"},  # the demo's own choice
    "protos/grammar.py": {"crash", "quantised", "nf4"},  # the example in its messages
    "coordinator/commands/emulator.py": {"crash", "distilled", "ends", "quantised"},  # examples, and its defaults
    "coordinator/commands/compare.py": {"crash", "quantised", "nf4", "lora"},  # examples in its help
    "coordinator/commands/transfer.py": {"kept", "lora"},  # its own default, every layer, and the spec's
}
HOMONYMS = {  # words that are also names
    **{f"coordinator/aggregation/{name}.py": {"sum"} for name in ("base", "factor_mean", "vote")},
    "coordinator/aggregation/mean.py": {"sum"},  # what is enough for a strategy, as in those above and below
    "coordinator/runs/legality.py": {"sum"},
    "emulator/methods/invertible.py": {"halves"},  # of a width
    "emulator/methods/loldu.py": {"sum"},  # in its formula
    "emulator/methods/soka.py": {"sum"},
    "kernels/compensated.py": {"sum"},  # in its messages
    "coordinator/runs/pairs.py": {"sum"},
    "coordinator/survey/matrix.py": {"sum"},
    "client/cli.py": {"all"},  # extras of the package
    "client/report.py": {"all"},  # sites
    "client/figures.py": {"all"},
    "coordinator/aggregation/low_rank.py": {"all", "sum"},  # what figures are of
    "coordinator/aggregation/index_union.py": {"all", "sum"},
    "coordinator/aggregation/requantise.py": {"sum"},
    "coordinator/backup/inventory.py": {"signature"},  # of a document
    "coordinator/commands/emulator.py": {"signature"},
    "coordinator/store/tables.py": {"signature"},
    "coordinator/store/tasks.py": {"signature"},
    "coordinator/commands/methods.py": {"all"},  # strategies
    "emulator/builders/storage.py": {"all"},  # layers
    "emulator/builders/sketched.py": {"all"},
    "coordinator/policy.py": {"whole"},  # a field of a grant
    "emulator/zoo/weights.py": {"quantised"},
    "kernels/quantise.py": {"quantised"},
    "kernels/schema.py": {"mean", "requantise", "sum", "vote"},  # rules
    "emulator/anatomy/narrow.py": {"blocks"},  # how fused rows lie
    "emulator/anatomy/roles.py": {"blocks"},
    "emulator/evaluation/accuracy.py": {"mean"},  # lm-eval's
    "emulator/modality/causal_text/__init__.py": {"mean", "sum"},  # how a loss is reduced
    "emulator/methods/base.py": {"additive"},  # a kind of methods
    "emulator/retention/ewc.py": {"fisher"},  # of what it is a function
    "emulator/retention/recall.py": {"sum"},  # how a divergence is reduced
    "emulator/retention/surgery.py": {"mean"},  # of tasks
    "emulator/placements.py": {"ends", "spread", "kept"},  # the file of all three
    "emulator/schedules.py": {*catalogue.SCHEDULES},  # likewise
    "emulator/builders/distilled.py": {"cosine", "distil"},  # how its own tuning decays, and where it goes on
    "emulator/tuning/loop.py": {"cosine"},
    "emulator/transfer/move.py": {"cosine"},
}


@cache
def sources() -> list[tuple[str, ast.Module]]:
    return [
        (str(path.relative_to(ROOT)), ast.parse(path.read_text()))
        for package in ("client", "coordinator", "emulator", "kernels", "protos")
        for path in sorted((ROOT / package).rglob("*.py"))
        if "_pb2" not in path.name
    ]


@cache
def spoken(tree: ast.Module) -> set[str]:
    """Return the names that a file's texts have, other than in its documentation."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]
    words = {word for text in texts for word in re.findall(r"[\w-]+", text)}
    return (words & COINED) | ({*texts} & NAMES)


def test_no_name_stands_outside_its_file_and_its_family() -> None:
    strayed = {}
    for file, tree in sources():
        names = spoken(tree) - OWN.get(file, set())
        for reasons in (ALLOWED, HOMONYMS):
            names -= reasons.get(file, set())
        if file not in FAMILY_FILES and names:
            strayed[file] = names
    assert strayed == {}


def test_what_is_allowed_is_needed() -> None:
    needed = {file: spoken(tree) for file, tree in sources()}
    for reasons in (ALLOWED, HOMONYMS):
        assert {file: names - needed[file] for file, names in reasons.items() if names - needed[file]} == {}


def test_no_end_imports_a_plug_in() -> None:
    imported = {
        (file, node.module)
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES and file not in OWN
    }
    assert imported == {("emulator/tuning/pv.py", "offsite.emulator.formats.additive")}  # what it tunes


@pytest.mark.parametrize("text", ['x = "grids"', 'x = f"use lora{1}"', 'if name == "whole": pass'])
def test_a_name_in_a_text_is_seen(text: str) -> None:
    assert spoken(ast.parse(text))
    assert not spoken(ast.parse(f"def f():\n    '''{text}'''"))


def test_the_sdks_classes_say_what_the_plug_ins_say() -> None:
    written = run_path(str(ROOT / ".ci" / "plugins"))["text"]()
    assert (ROOT / "client" / "plugins.py").read_text() == written, (
        "run python .ci/plugins and commit client/plugins.py"
    )
