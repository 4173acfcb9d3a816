"""What trains in a round: drawn with equal chances, and the same wherever it is drawn."""

import copy
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from offsite.emulator import modality, parts
from offsite.emulator.methods import make
from offsite.emulator.methods.proof import Witness
from offsite.emulator.parts import Part, Turn
from offsite.emulator.parts.base import by_layer
from offsite.emulator.parts.draws import drawn, weighted
from offsite.emulator.parts.training import Trained, freeze, whole_schema
from offsite.kernels.schema import Field, Rule, Schema, groups, only

LAYERS = (0, 1, 4, 5, 8, 9, 10, 28)
MAPS, NORMS = ("attn.q", "attn.k", "attn.v", "mlp.up", "mlp.down"), ("norm1", "norm2", "norm3")
SCHEMA: Schema = {
    **{f"{layer}.{name}.weight": Field("F32", (4, 4), Rule.MEAN) for layer in LAYERS for name in MAPS},
    **{f"{layer}.{name}.weight": Field("F32", (4,), Rule.MEAN) for layer in LAYERS for name in NORMS},
    "scale": Field("F32", (1,), Rule.MEAN),
    "4.index": Field("I32", (2,), Rule.FIXED, below=3),
}
PAIRS: Schema = {
    f"{layer}.{name}.{factor}": Field("F32", (None, 4) if factor == "A" else (4, None), Rule.PRODUCT, f"{layer}.{name}")
    for layer in LAYERS
    for name in MAPS
    for factor in "AB"
}
EXPERTS: Schema = {f"{layer}.mlp.{number}": Field("F32", (4,), Rule.MEAN) for layer in LAYERS for number in range(3)}
OWN = by_layer(SCHEMA).own
CRITICAL = {1: 6.63, 7: 18.48}  # of chi squared at p = 0.01, by degrees of freedom


def chi_squared(counts: Counter[Any], outcomes: int) -> float:
    expected = counts.total() / outcomes
    return sum((count - expected) ** 2 for count in counts.values()) / expected + (outcomes - len(counts)) * expected


def layers_of(part: Part, turn: Turn) -> set[int]:
    found = part.groups(SCHEMA, turn)
    assert "scale" in found and "4.index" not in found
    assert all({*of} <= found or not {*of} & found for of in OWN.values()), "layers train whole"
    return {layer for layer, of in OWN.items() if {*of} <= found}


def test_every_layer_is_drawn_as_often_over_a_thousand_rounds() -> None:
    part = parts.make("lisa", {"layers": 2})
    sets = [layers_of(part, Turn(3, number, "ward")) for number in range(1000)]
    assert {len(one) for one in sets} == {2}
    # Two of eight without replacement: the counts vary by (8 - 2) / (8 - 1) of what independent draws would.
    assert chi_squared(Counter(layer for one in sets for layer in one), 8) / (6 / 7) < CRITICAL[7]
    assert len({frozenset(one) for one in sets}) == 28, "every pair comes"


def test_every_group_is_in_the_half_as_often_as_out_of_it_or_by_its_kind() -> None:
    part, often = parts.make("half", {}), Counter[str]()
    for number in range(1000):
        found = part.groups(SCHEMA, Turn(0, number, "ward"))
        for layer in LAYERS:
            assert sum(f"{layer}.{name}.weight" in found for name in MAPS) == 3
            assert sum(f"{layer}.{name}.weight" in found for name in NORMS) == 2
        often.update(found)
    assert "4.index" not in often and often["scale"] == 1000
    for names, share in ((MAPS, 3 / 5), (NORMS, 2 / 3)):
        for name in names:
            count = often[f"0.{name}.weight"]
            assert (count - 1000 * share) ** 2 / (1000 * share * (1 - share)) < CRITICAL[1] + 3


@pytest.mark.parametrize("name", ["lisa", "half"])
def test_rounds_and_seeds_differ_and_sites_do_where_they_are_to(name: str) -> None:
    together, apart = parts.make(name, {}), parts.make(name, {"per": "site"})
    turn = Turn(0, 0, "ward")
    assert together.alike and not apart.alike
    others = [turn._replace(round=1), turn._replace(seed=1), turn._replace(site="bank")]
    assert [together.groups(SCHEMA, one) == together.groups(SCHEMA, turn) for one in others] == [False, False, True]
    assert [apart.groups(SCHEMA, one) == apart.groups(SCHEMA, turn) for one in others] == [False, False, False]


@pytest.mark.parametrize("name", ["bottleneck", "compacter"])
def test_half_draws_what_does_nothing_alone_with_what_it_needs(name: str, tiny: Any, text: Any) -> None:
    method, places = make(name, {"biases": True} if name == "bottleneck" else {}), {0: 0, 5: 5}
    base = tiny()
    start = method.start(base, places, seed=0)
    whole, part = whole_schema(method, start), parts.make("half", {})
    for number in range(8):
        model = method.attach(copy.deepcopy(base), places, start)
        own = part.groups(whole, Turn(0, number, "ward"))
        trained = freeze(method.named_parameters(model, places), Trained(only(whole, own)))
        assert trained.keys() < method.named_parameters(model, places).keys()
        witness = Witness(trained)
        modality.loss(model, text[0]).backward()
        witness.judge()


@pytest.mark.parametrize("name", parts.PARTS)
def test_a_group_trains_whole_or_not_at_all(name: str) -> None:
    part, schema = parts.make(name, {}), PAIRS | EXPERTS | {"0.row": Field("F32", (4,), Rule.MEAN, private=4)}
    chosen = part.largest(_settled(schema)) if isinstance(part, parts.Scoring) else ()
    found = part.groups(schema, Turn(0, 0, "ward"), chosen)
    assert found <= groups(schema).keys() and (found < groups(schema).keys()) == part.partial


def _settled(schema: Schema) -> Schema:
    return {key: Field(field.dtype, (4, 4), field.rule, field.group) for key, field in schema.items()}


def test_another_process_draws_the_same_without_a_tensor_library() -> None:
    turn = Turn(5, 17, "ward")
    code = f"""if True:
        import sys
        from offsite.emulator import parts
        from offsite.emulator.parts import Turn
        from offsite.kernels.schema import Field, Rule
        schema = {{f"{{n}}.{{m}}": Field("F32", (2, 2), Rule.MEAN) for n in range(8) for m in "abcd"}}
        for name in ("lisa", "half"):
            print(sorted(parts.make(name, {{"per": "site"}}).groups(schema, Turn{tuple(turn)})))
        assert not {{"torch", "numpy"}} & sys.modules.keys()
    """
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    schema = {f"{n}.{m}": Field("F32", (2, 2), Rule.MEAN) for n in range(8) for m in "abcd"}
    mine = [str(sorted(parts.make(name, {"per": "site"}).groups(schema, turn))) for name in ("lisa", "half")]
    assert told == mine


def test_draws_are_the_same_for_ever() -> None:
    """A site and a coordinator of other versions draw alike, and so does a run that goes on after an upgrade."""
    assert drawn(range(30), 4, "lisa", 0, 0) == [0, 6, 13, 16]
    assert weighted(dict.fromkeys(range(30), 0.5), 4, "ist", 0) == [8, 11, 12, 21]


def test_weights_are_chances() -> None:
    counts = Counter(weighted({"a": 1.0, "b": 3.0}, 1, number)[0] for number in range(2000))
    assert (counts["b"] - 1500) ** 2 / (2000 * 0.75 * 0.25) < CRITICAL[1]
    assert weighted({"a": 1.0, "b": 0.0}, 1, 0) == ["a"] and weighted({"a": 1.0, "b": 0.0}, 2, 0) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lisa", {"layers": 0}, "layers must be at least 1, got 0"),
        ("lisa", {"per": "step"}, "per: .*'round' or 'site'"),
        ("half", {"per": "layer"}, "per: .*'round' or 'site'"),
        ("ist", {"share": 1.0}, "share must be above 0 and below 1, got 1.0"),
        ("ist", {"trials": 0}, "trials must be at least 1"),
        ("ist", {"response": 1.0}, "response must be at least 0 and below 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parts.make(name, settings)


@pytest.mark.parametrize(
    ("name", "settings", "schema", "words"),
    [
        ("lisa", {"layers": 8}, SCHEMA, "lisa draws 8 layers in each round, and the adapter has 8; ask for fewer"),
        ("half", {}, {"0.q": Field("F32", (2, 2), Rule.MEAN)}, "half leaves nothing out"),
        ("ist", {}, {"0.q": Field("F32", (2, 2), Rule.MEAN)}, "ist chooses among layers, and the adapter has 1"),
    ],
)
def test_a_part_that_would_leave_nothing_out_is_refused(
    name: str, settings: dict[str, Any], schema: Schema, words: str
) -> None:
    part = parts.make(name, settings)
    for refuse in (lambda: part.fits(schema), lambda: part.groups(schema, Turn(0, 0, "ward"))):
        with pytest.raises(ValueError, match=words):
            refuse()


@pytest.mark.parametrize("name", ["all", "lisa", "half"])
def test_a_choice_that_a_site_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"part {name} leaves a site nothing to choose, and one chose .4."):
        parts.make(name, {}).groups(SCHEMA, Turn(0, 0, "ward"), (4,))
