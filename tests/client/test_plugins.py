"""Plug-ins by classes of their own: the same runs as recipes and choices say."""

import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
from pydantic import ValidationError

from offsite.client import RunSpec, TrainingSpec, plugins
from offsite.client.config import Config
from offsite.client.plugins import Cosine, Crash, Ewc, Lora, LowRank, LtSft, Noise, NoMemory, Quantised
from offsite.protos.documents import to_json
from offsite.protos.spec import METHOD, Choice


def test_a_run_of_classes_is_that_of_recipes_to_the_byte() -> None:
    stated: Any = {
        "builders": Crash(keep=24) + Quantised(format="nf4"),
        "method": Lora(rank=4, ranks={"bank": 2}),
        "strategy": LowRank(),
        "upload": Noise(share=0.02),
        "memory": NoMemory(),
    }
    training: Any = {"schedule": Cosine(), "retention": Ewc(strength=2.0)}
    named: Any = {
        "builders": "crash(keep=24)+quantised"
        if Quantised().format == "nf4"
        else "crash(keep=24)+quantised(format=nf4)",
        "method": "lora(rank=4,ranks={bank:2})",
        "strategy": "low-rank",
        "upload": "noise(share=0.02)",
        "memory": "none",
    }
    spec = RunSpec(model="m", training=TrainingSpec(**training), **stated)
    other: Any = {"schedule": "cosine", "retention": "ewc(strength=2.0)"}
    assert spec == RunSpec(model="m", training=TrainingSpec(**other), **named)
    assert to_json(spec) == to_json(RunSpec(model="m", training=TrainingSpec(**other), **named))
    assert type(spec.method) is Choice and all(type(one) is Choice for one in spec.builders)


def test_a_chain_may_be_a_list_and_may_mix_classes_and_choices() -> None:
    mixed: Any = [Crash(keep=9), Choice(name="distilled")]
    assert [one.name for one in RunSpec(model="m", builders=mixed).builders] == ["crash", "distilled"]
    assert (Crash() + Quantised()) + Crash() == (Crash(), Quantised(), Crash())
    two: Any = Lora() + Lora()
    with pytest.raises(ValidationError, match="method"):
        RunSpec(model="m", method=two)


def test_a_default_is_not_said_and_a_setting_that_is_not_there_is_refused_at_once() -> None:
    assert Lora().choice == METHOD and Lora(rank=8).choice == METHOD
    assert replace(Lora(rank=2), alpha=3.0).choice.settings == {"rank": 2, "alpha": 3.0}
    unknown: Any = {"rnak": 2}
    with pytest.raises(TypeError, match="rnak"):
        Lora(**unknown)
    assert LtSft.plugin == "lt-sft" and Lora(rank=2) != Lora() and repr(Cosine()) == "Cosine()"


def test_each_class_is_documented_and_stands_for_its_plug_in() -> None:
    assert len(plugins.__all__) > 80
    for name in plugins.__all__:
        cls: Any = getattr(plugins, name)
        assert issubclass(cls, Config) and len(cls.__doc__) > 10 and not cls.__doc__.startswith(name + "(")
        if all(field.name not in ("choice", "plugin") for field in fields(cls)):
            assert cls().choice == Choice(name=cls.plugin)


def test_naming_them_loads_no_tensor_library() -> None:
    program = (
        "import sys, offsite.client.plugins; print({'torch', 'numpy', 'ray', 'transformers'} & sys.modules.keys())"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"
