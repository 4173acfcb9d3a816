"""`--set`: merged into the defaults, read as what a field holds, and refused in a sentence that says what was meant."""

from typing import Any

import pytest

from offsite.protos.assignments import assign
from offsite.protos.documents import parse
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice, RunSpec


def spec(*settings: str, **value: Any) -> RunSpec:
    return parse(RunSpec, assign(settings, {"model": "m", **value}, RunSpec), where="run")


def test_one_setting_of_a_default_leaves_the_rest_of_it() -> None:
    assert spec("method.settings.rank=4").method == Choice(name="lora", settings={"rank": 4})
    assert spec("method.settings.ranks.bank=4").method.settings == {"ranks": {"bank": 4}}
    assert spec("builders.0.settings.keep=20").builders == (Choice(name="crash", settings={"keep": 20}),)
    assert spec("training.steps=3").training.batch_size == 4
    assert spec("trainable.name=spread", "trainable.settings.count=3").trainable.settings == {"count": 3}


def test_a_setting_goes_into_what_the_file_says() -> None:
    given = {"name": "lora", "settings": {"rank": 8, "alpha": 16.0}}
    assert spec("method.settings.rank=4", method=given).method.settings == {"rank": 4, "alpha": 16.0}


def test_a_value_is_read_as_what_its_field_holds() -> None:
    assert spec("name=123").name == "123" and spec('name="a b"').name == "a b" and spec("name=true").name == "true"
    assert spec("evaluation.exam=7").evaluation == {"exam": "7"}
    assert spec("rounds=3").rounds == 3 and spec("merge=true").merge and spec("stall_s=5").stall_s == 5.0
    assert spec('sites=["a","b"]').sites == ("a", "b") and spec("training.precision=bf16").training.precision == "bf16"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rounds", "--set rounds: expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("rounds=two", "rounds: Input should be a valid integer .got 'two'."),
        ("rounds=1.5", "rounds: Input should be a valid integer .got 1.5."),
        ("rounds=true", "rounds: Input should be a valid integer .got True."),
        ("merge=yes", "merge: Input should be a valid boolean .got 'yes'."),
        ("round=3", "there is no round; did you mean rounds?"),
        ("trainig.steps=3", "there is no trainig; did you mean training?"),
        ("training.step=3", "there is no training.step; did you mean steps?"),
        ("xyzzy=3", "there is no xyzzy; expected one of model, name"),
        ("method.setting.rank=4", "there is no method.setting; did you mean settings?"),
        ("builders.settings.keep=4", "builders is a list of 1, counted from 0; write for example builders.0.settings"),
        ("builders.1.name=x", "builders is a list of 1"),
        ("rounds.x=1", "rounds holds one value"),
        ("sites=bank", "sites: expected a list .got 'bank'."),
        ("method=blocks+lora", "method: expected one choice, got 2 .got 'blocks.lora'."),
        ("stall_s=Infinity", "stall_s: Input should be a valid number .got 'Infinity'."),
        ("stall_s=1e999", "not a number of at most 1e.300"),
        ("name=" + "x" * 5000, "name: .*at most 200 characters"),
        ("a." * 5000 + "b=1", "there is no a"),
        ("method.settings.x=" + "[" * 50_000, "run: "),
        ("\x1b[31m=1", "there is no"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_short_sentence(setting: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        spec(setting)
    assert len(str(refused.value)) < 600 and str(refused.value).isprintable()
