"""The proof of concept in containers: what its files name is there, and the product reads it."""

import json
import re
import shlex
from importlib import resources

import pytest
import yaml

from offsite.client.site.policy import Policy
from offsite.coordinator.policy import OwnerPolicy
from offsite.emulator import builders, methods
from offsite.protos.documents import from_toml
from offsite.protos.spec import RunSpec


@pytest.fixture
def folder(deploy):
    return deploy / "compose"


@pytest.fixture
def compose(folder):
    return yaml.safe_load((folder / "compose.yaml").read_text())


@pytest.mark.parametrize("name", ["compose.yaml", "stores.yaml"])
def test_the_files_follow_compose_s_schema(folder, name) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas")
    schema = json.loads(resources.files(schemas).joinpath("vendor", "compose-spec.json").read_text())
    jsonschema.validate(yaml.safe_load((folder / name).read_text()), schema)


def test_every_file_volume_network_and_variable_that_is_named_is_there(folder, compose) -> None:
    text = (folder / "compose.yaml").read_text()
    header = text[: text.index("name:")]
    for name in set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", text)):
        assert re.search(rf"\b{name}\b", header) or f"{name}:" in text, name
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{[A-Z]+:-(.*?)\}", r"\1", mount).split(":")[0]
            assert source in compose["volumes"] or source.startswith("${MODEL") or (folder / source).exists(), mount
        networks = service.get("networks", [])
        assert set(networks) <= compose["networks"].keys()
        assert set(service.get("depends_on", {})) <= compose["services"].keys()


def test_every_container_is_locked_up_and_sites_cannot_see_each_other(compose) -> None:
    services = compose["services"]
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert {name for name, service in services.items() if service.get("user", "10001")[0] == "0"} == {"authority"}
    assert services["bank"]["networks"] == ["bank"] and services["hospital"]["networks"] == ["hospital"]
    assert compose["networks"]["bank"]["internal"] and compose["networks"]["hospital"]["internal"]
    for site in ("bank", "hospital"):
        assert not any(mount.startswith(("owner", "researcher")) for mount in services[site]["volumes"])


def test_every_command_is_one_that_the_product_takes(compose, takes) -> None:
    lines = [line for service in compose["services"].values() for line in commands(service)]
    assert len(lines) >= 7
    for line in lines:
        takes(line)


def commands(service):
    """What a service runs of ours: its own command, or each `offsite` of a script."""
    if "sh" not in service.get("entrypoint", []):
        return [service["command"]] if "command" in service else []
    script = "\n".join([*service["entrypoint"], *service.get("command", [])])
    script = re.sub(r"\$\$?\{?\w+(:-(\w+))?\}?", r"\2", script).replace("$$@", "run list")
    found = re.findall(r"\boffsite ((?:pki|site|run|identity|coordinator) [^|;>\n]*)", script)
    return [shlex.split(line.replace('""', "x")) for line in found]


def test_the_product_reads_the_examples(folder, tmp_path) -> None:
    for name, place in (("owner", "texts"), ("policy", "data")):
        text = (folder / f"{name}.toml").read_text()
        text = text.replace(f"/srv/offsite/{place}", str(folder / place)).replace("/srv/offsite/model", str(tmp_path))
        (tmp_path / f"{name}.toml").write_text(text)
    owner = OwnerPolicy.load(tmp_path / "owner.toml")
    spec = from_toml(RunSpec, folder / "run.toml")
    assert spec.model in owner.models
    assert builders.make(spec.builders[0].name, spec.builders[0].settings).name in owner.builders
    assert methods.make(spec.method.name, spec.method.settings) and spec.method.name in owner.methods
    for text in (spec.public, *spec.evaluation.values()):
        assert (folder / "texts" / text).is_file()
    policy = Policy.load(tmp_path / "policy.toml")
    assert spec.method.name in policy.methods and spec.rounds <= policy.max_rounds
    for site in spec.sites:
        policy.check_data(folder / "data" / site)
        rows = len((folder / "data" / site / "notes.jsonl").read_text().splitlines())
        assert rows >= policy.min_rows
        seen = spec.rounds * spec.training.steps * spec.training.batch_size
        assert seen / rows <= policy.max_passes
