"""Recipes: plug-ins as one writes them in a line, such as `crash(keep=20, sharing="auto") + quantised(format="nf4")`.

They are read by `grammar` and become choices: one chain, or one per combination of a grid's alternatives.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import Any

from offsite.protos.documents import parse as parse_document
from offsite.protos.documents import quoted, read_toml
from offsite.protos.errors import InputError
from offsite.protos.grammar import CONSTANTS, EXAMPLE, Grid, read
from offsite.protos.spec import Chain, Choice

CHAINS = 4096  # of a grid
_WORD = re.compile(r"[A-Za-z_]\w*(-[A-Za-z_]\w*)*", re.ASCII)


def parse(text: str) -> Chain:
    """Read a recipe that stands for one chain; raises InputError that names the place of the fault."""
    return _product(read(text, grid=False))[0]


def parse_one(text: str) -> Choice:
    """Read a recipe of a single choice, such as `ends(bottom=1,top=1)`; raises InputError."""
    (choice, *more) = parse(text)
    if more:
        raise InputError(
            f"recipe {quoted(text)}: expected one choice such as {render([choice])}, found {len(more) + 1}"
        )
    return choice


def expand(text: str) -> list[Chain]:
    """Read a grid: one chain per combination of alternatives, the first setting's varying last. Raises InputError."""
    return _product(read(text, grid=True))


def gather(grids: Sequence[str]) -> list[Chain]:
    """Expand several grids, each a recipe or the path of a TOML file with a list `recipes`; equal chains count once."""
    chains: dict[str, Chain] = {}
    for grid in grids:
        for text in _listed(Path(grid)) if grid.endswith(".toml") else [grid]:
            chains |= {render(chain): chain for chain in expand(text)}
    return list(chains.values())


def render(chain: Sequence[Choice]) -> str:
    """Write a chain as the recipe that reads back as it."""
    return "+".join(f"{choice.name}{_settings(choice.settings)}" for choice in chain)


def _listed(path: Path) -> list[str]:
    table = read_toml(path)
    recipes = table.get("recipes")
    if set(table) != {"recipes"} or not isinstance(recipes, list) or not all(isinstance(one, str) for one in recipes):
        raise InputError(f'{path}: expected one list of texts, recipes = ["{EXAMPLE}"]')
    return recipes


def _product(chain: Grid) -> list[Chain]:
    if math.prod(len(values) for _, grid in chain for values in grid.values()) > CHAINS:
        raise InputError(f"recipe: a grid of more than {CHAINS} chains; write a smaller one")
    choices = [
        [
            parse_document(Choice, {"name": name, "settings": dict(zip(grid, values, strict=True))}, where="recipe")
            for values in itertools.product(*grid.values())
        ]
        for name, grid in chain
    ]
    return list(itertools.product(*choices))


def _settings(settings: Mapping[str, Any]) -> str:
    pairs = ",".join(f"{name}={_value(value)}" for name, value in settings.items())
    return f"({pairs})" if pairs else ""


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{_value(key)}:{_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str):
        bare = _WORD.fullmatch(value) and value not in CONSTANTS and not any(map(iskeyword, value.split("-")))
        return value if bare else json.dumps(value, ensure_ascii=False)
    return str(value).lower()
