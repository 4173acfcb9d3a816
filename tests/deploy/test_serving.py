"""Examples for vLLM and Ray Serve: what Docker's schema allows, and one bound of ranks in both."""

import json
import re
from importlib import resources

import pytest
import yaml


@pytest.fixture
def folder(deploy):
    return deploy / "serving"


def test_the_container_follows_compose_s_schema_and_names_its_variables(folder) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas")
    schema = json.loads(resources.files(schemas).joinpath("vendor", "compose-spec.json").read_text())
    text = (folder / "vllm.yaml").read_text()
    jsonschema.validate(yaml.safe_load(text), schema)
    header = text[: text.index("name:")]
    assert set(re.findall(r"\$\{([A-Z_]+)", text)) == set(re.findall(r"\b([A-Z]{3,})\b", header))


def test_both_take_adapters_of_the_same_ranks(folder) -> None:
    command = yaml.safe_load((folder / "vllm.yaml").read_text())["services"]["vllm"]["command"]
    options = dict(one.removeprefix("--").partition("=")[::2] for one in command)
    (application,) = yaml.safe_load((folder / "ray.yaml").read_text())["applications"]
    (model,) = application["args"]["llm_configs"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    assert model["engine_kwargs"]["enable_lora"] is True and "enable-lora" in options
    assert int(options["max-lora-rank"]) == model["engine_kwargs"]["max_lora_rank"]
    assert int(options["max-lora-rank"]) in (8, 16, 32, 64, 128, 256, 320, 512), "which vLLM has kernels for"
