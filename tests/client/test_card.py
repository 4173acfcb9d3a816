"""The card of what a run published."""

import yaml

from offsite.client.card import card

from .test_report import report

FILES = {"adapter/adapter_config.json": "sha256:1", "adapter/adapter_model.safetensors": "sha256:2"}


def test_a_card_says_what_it_is_of_and_names_no_site() -> None:
    own = report() | {"overall": {"base_zero_shot": 20.5, "plug_in": 11.25}, "name": "notes"}
    text = card(own, FILES)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "m",
        "library_name": "peft",
        "tags": ["offsite", "federated-learning", "lora"],
    }
    assert "# notes" in body and "PeftModel.from_pretrained" in body and "| plug-in | 11.2" in body
    assert "1 rounds of 2 steps at up to 1 sites" in body and "`sha256:2`" in body
    assert "bank" not in body and "lab" not in body


def test_what_others_named_is_no_markup_in_it() -> None:
    own = report() | {"name": "<script>\n# x", "overall": {}}
    own["base"] = own["base"] | {"name": 'a"b\n: c'}
    text = card(own, {"ensemble.json": "sha256:3", **FILES})
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == 'a"b : c'
    assert "<script>" not in body.replace("\\<script\\>", "") and "\n# x" not in body
    assert 'load(AutoModelForCausalLM.from_pretrained(BASE), Path("."))' in body and "## Figures" not in body
