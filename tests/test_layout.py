"""The shape of the house: what the tools cannot see by themselves."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from offsite.client.site.policy import Policy
from offsite.deploy.simulation.world import World
from offsite.emulator import builders, methods
from offsite.protos import upload
from offsite.protos.documents import from_toml
from offsite.protos.spec import RunSpec

ROOT = Path(__file__).parent.parent
PACKAGES = ("client", "coordinator", "deploy", "emulator", "kernels", "protos")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name]


def test_kernels_has_no_init_because_transformers_imports_a_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_reached_by_its_link(package: str) -> None:
    assert (ROOT / ".src" / "offsite" / package).resolve() == ROOT / package


def test_no_file_is_longer_than_a_head() -> None:
    written = ROOT / "client" / "plugins.py"  # by a program, for programs that complete
    lengths = {str(path): len(path.read_text().splitlines()) for path in SOURCES if path != written}
    assert {path: n for path, n in lengths.items() if n > 400} == {}


def test_no_module_hides_behind_a_word_that_means_nothing() -> None:
    assert not {"utils", "helpers", "common", "misc", "manager"} & {path.stem for path in SOURCES}


def test_nothing_unpickles_and_nothing_runs_remote_code() -> None:
    banned = ("import pickle", "torch.load(", "trust_remote_code=True", "cloudpickle", "dill")
    found = {(str(path), word) for path in SOURCES for word in banned if word in path.read_text()}
    assert found == set()


@pytest.mark.parametrize("package", ["client", "deploy"])
def test_public_names_are_sorted_and_there(package: str) -> None:
    module = importlib.import_module(f"offsite.{package}")
    assert module.__all__ == sorted(module.__all__) and len(module.__all__) <= 15
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_example_files_are_what_the_commands_take(tmp_path: Path) -> None:
    spec = from_toml(RunSpec, ROOT / "docs" / "run.toml")
    assert [builders.make(choice.name, choice.settings).name for choice in spec.builders] == ["crash"]
    assert methods.make(spec.method.name, spec.method.settings).tier_at("bank") == "r4"
    assert [stage.name for stage in upload.make(spec.upload)] == ["noise"]
    policy = (ROOT / "docs" / "policy.toml").read_text().replace("/srv/offsite/data", str(tmp_path))
    (tmp_path / "policy.toml").write_text(policy)
    assert Policy.load(tmp_path / "policy.toml").max_rounds == 20
    assert World.load(ROOT / "docs" / "world.toml").dropout == 0.05


def test_the_readme_holds_no_gap() -> None:
    assert "@@" not in (ROOT / "README.md").read_text()


def test_importing_the_sdk_loads_no_tensor_library() -> None:
    loaded = "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    code = f"import json, sys, offsite.client, offsite.deploy; {loaded}"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "transformers", "deepspeed", "numpy", "typer"} & set(json.loads(told.stdout))
