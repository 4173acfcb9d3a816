"""The report: perplexities over all sets, and what a careful reader would object to."""

import math

import pytest

from offsite.coordinator.report import perplexities, warnings


def test_over_all_is_over_all_tokens_not_over_sites() -> None:
    overall, sites = perplexities({"plug_in": {"a": {"nll": 30.0, "tokens": 10}, "b": {"nll": 30.0, "tokens": 30}}})
    assert overall["plug_in"] == pytest.approx(math.exp(60 / 40))
    assert sites["a"]["plug_in"] == pytest.approx(math.exp(3.0)) and sites["b"]["plug_in"] == pytest.approx(math.e)


def test_a_broken_emulator_is_a_large_number_not_a_crash() -> None:
    assert perplexities({"e": {"a": {"nll": 1e9, "tokens": 10}}})[0]["e"] == math.exp(700)


def test_an_emulator_too_small_to_be_useful_is_a_warning() -> None:
    assert warnings({"base_zero_shot": 10.0, "emulator_zero_shot": 499.0, "plug_in": 9.0}) == []
    (found,) = warnings({"base_zero_shot": 10.0, "emulator_zero_shot": 501.0, "plug_in": 9.0})
    assert "too small to be useful" in found and "50 times" in found and "keep more layers" in found


def test_a_tuning_that_did_not_help_is_a_warning() -> None:
    (found,) = warnings({"base_zero_shot": 10.0, "emulator_zero_shot": 20.0, "plug_in": 10.5})
    assert "did not help" in found
