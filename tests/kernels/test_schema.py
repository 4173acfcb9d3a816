"""What a schema allows to be said of tensors, and what it refuses to say."""

import subprocess
import sys

import pytest

from offsite.kernels.schema import (
    Codes,
    Entries,
    Factors,
    Field,
    Rule,
    Schema,
    codes,
    entries,
    factors,
    is_judged_by_value,
    is_open,
    rules,
    settle,
    size_bytes,
    votes,
)

LORA: Schema = {
    "0.q.A": Field("F32", (None, 6), Rule.PRODUCT, "0.q"),
    "0.q.B": Field("F32", (4, None), Rule.PRODUCT, "0.q"),
}
SPARSE: Schema = {
    "0.index": Field("I32", (3,), Rule.FIXED, "0", below=24),
    "0.values": Field("F32", (3,), Rule.MEAN, "0"),
}


def test_the_factors_of_a_product_are_told_apart_by_their_shapes_whatever_their_names() -> None:
    assert factors(LORA | SPARSE) == {"0.q": Factors(B="0.q.B", A="0.q.A")}
    swapped = {"0.q.A": LORA["0.q.B"], "0.q.B": LORA["0.q.A"]}
    assert factors(swapped) == {"0.q": Factors(B="0.q.A", A="0.q.B")}


@pytest.mark.parametrize(
    "schema",
    [
        {"0.q.A": LORA["0.q.A"]},
        {"0.q.A": LORA["0.q.A"], "0.q.C": LORA["0.q.A"]},
        LORA | {"0.q.C": LORA["0.q.A"]},
        LORA | {"0.q.B": Field("F32", (4, 2), Rule.PRODUCT, "0.q")},
        LORA | {"0.q.B": Field("F32", (None, None), Rule.PRODUCT, "0.q")},
        LORA | {"0.q.B": Field("F32", (4, None, 1), Rule.PRODUCT, "0.q")},
    ],
)
def test_a_product_that_is_not_one_of_two_matrices_is_refused(schema: Schema) -> None:
    with pytest.raises(ValueError, match=r"group '0.q': a product has factors \(d_out, None\)"):
        factors(schema)


UNION: Schema = {
    "2.at": Field("I32", (None,), Rule.UNION, "2", below=24),
    "2.values": Field("F32", (None,), Rule.UNION, "2"),
}


def test_an_index_and_its_values_are_told_apart_by_their_types_whether_sizes_are_settled_or_not() -> None:
    assert entries(UNION | LORA | SPARSE) == {"2": Entries(at="2.at", values="2.values")}
    assert entries(settle(UNION, {"2.at": (5,), "2.values": (5,)})) == entries(UNION)
    assert entries(LORA | SPARSE) == {}


@pytest.mark.parametrize(
    "schema",
    [
        {"2.at": UNION["2.at"]},
        UNION | {"2.more": UNION["2.values"]},
        UNION | {"2.values": Field("F32", (3,), Rule.UNION, "2")},
        {key: Field(field.dtype, (2, 3), Rule.UNION, "2", below=field.below) for key, field in UNION.items()},
    ],
)
def test_a_union_that_is_not_an_index_and_its_values_is_refused(schema: Schema) -> None:
    with pytest.raises(ValueError, match=r"group '2': a union has integers \(k,\) and values \(k,\)"):
        entries(schema)


def test_the_sizes_that_sites_choose_are_settled_by_their_shapes() -> None:
    settled = settle(LORA | SPARSE, {"0.q.A": (2, 6), "0.q.B": (4, 2), "0.index": (3,), "0.values": (3,)})
    assert is_open(LORA) and not is_open(settled) and not is_open(SPARSE)
    assert settled["0.q.A"].shape == (2, 6) and settled["0.q.A"].group == "0.q"
    assert size_bytes(settled) == 4 * (12 + 8 + 3 + 3)
    assert rules(settled) == {Rule.PRODUCT, Rule.MEAN, Rule.FIXED}
    with pytest.raises(ValueError, match="is open"):
        size_bytes(LORA)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"0.q.A": (2, 6)}, r"other tensors: \['0.q.B'\]"),
        ({"0.q.A": (2, 5), "0.q.B": (4, 2)}, r"tensor 0.q.A of shape \[2, 5\] does not fit the schema's \[None, 6\]"),
        ({"0.q.A": (2, 6, 1), "0.q.B": (4, 2)}, "does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settle(LORA, shapes)


@pytest.mark.parametrize(
    ("dtype", "shape", "rule", "below", "words"),
    [
        ("C64", (3,), Rule.MEAN, None, "dtype 'C64' is none of F64, F32"),
        ("I32", (3,), Rule.MEAN, 9, "not mean"),
        ("I32", (None,), Rule.UNION, None, "are below something, not None"),
        ("I32", (3,), Rule.FIXED, None, "are below something, not None"),
        ("F32", (3,), Rule.FIXED, 9, "only integers have a bound"),
        ("F32", (-1,), Rule.MEAN, None, "negative"),
    ],
)
def test_a_field_that_could_not_be_folded_is_refused(
    dtype: str, shape: tuple[int, ...], rule: Rule, below: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Field(dtype, shape, rule, below=below)


@pytest.mark.parametrize(("rows", "rule"), [(4, Rule.MEAN), (-1, Rule.MEAN), (1, Rule.FIXED)])
def test_rows_of_one_layer_are_some_of_those_that_are_averaged(rows: int, rule: Rule) -> None:
    assert Field("F32", (3, 2), Rule.MEAN, private=3).private == 3
    with pytest.raises(ValueError, match=rf"{rows} private rows of \(3, 2\), {rule}"):
        Field("F32", (3, 2), rule, private=rows)


def test_packed_bits_are_counted_by_the_bit_and_sent_by_the_byte() -> None:
    field = Field("U8", (3,), Rule.VOTE, bits=20)
    assert votes(LORA | {"0.mask": field}) == {"0.mask": 20}
    assert (field.size_bytes, field.trained) == (3, 20)
    trained = [one.trained for one in (*SPARSE.values(), Field("F32", (3,), Rule.FIXED))]
    assert trained == [0, 3, 0]


@pytest.mark.parametrize(
    ("dtype", "shape", "rule", "bits", "words"),
    [
        ("U8", (3,), Rule.VOTE, None, "bits are voted on or codes, and nothing else is: bits = None, vote"),
        ("F32", (3,), Rule.MEAN, 20, "bits are voted on or codes, and nothing else is: bits = 20, mean"),
        ("U8", (2,), Rule.VOTE, 20, r"20 packed bits are U8 \(3,\) without a bound, not U8 \(2,\)"),
        ("I32", (3,), Rule.VOTE, 20, r"20 packed bits are U8 \(3,\) without a bound, not I32 \(3,\)"),
    ],
)
def test_bits_that_could_not_be_voted_on_are_refused(
    dtype: str, shape: tuple[int, ...], rule: Rule, bits: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Field(dtype, shape, rule, bits=bits)


CODED: Schema = {
    "3.codes": Field("U8", (3,), Rule.REQUANTISE, "3", bits=22, width=2),
    "3.line": Field("F32", (2,), Rule.REQUANTISE, "3"),
}


def test_codes_and_their_line_are_told_apart_and_a_value_trains_for_each_code() -> None:
    assert codes(CODED | LORA) == {"3": Codes(codes="3.codes", line="3.line")} and votes(CODED) == {}
    assert [field.trained for field in CODED.values()] == [11, 0]
    assert is_judged_by_value(CODED) and is_judged_by_value(UNION) and not is_judged_by_value(LORA | SPARSE)
    with pytest.raises(ValueError, match=r"group '3': values in few bits have codes and a line F32 \(2,\)"):
        codes({"3.codes": CODED["3.codes"]})
    with pytest.raises(ValueError, match="21 bits are not values of 2 bits each"):
        Field("U8", (3,), Rule.REQUANTISE, "3", bits=21, width=2)


def test_it_brings_no_tensor_library() -> None:
    code = "import sys, offsite.kernels.schema; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
