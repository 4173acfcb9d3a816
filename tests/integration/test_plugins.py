"""A package of another house: built as a wheel, installed, run by name from end to end, and held to the same suites."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offsite.client import Choice

TESTS = Path(__file__).parents[1]
PLUGINS = ["halves", "query-value", "tolerant", "sparse", "top", "series"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip installs it, from a wheel it built."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for file in ("pyproject.toml", *(f"offsite_{name}.py" for name in ("halves", "series", "sparse", "top"))):
        (source / file).write_text((TESTS / "plugin" / file).read_text())
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, "--target", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def environment(installed: Path) -> dict[str, str]:
    """What a process has the package by."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH", "")]))}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, federations: Any, environment: dict[str, str]) -> Iterator[Any]:
    """A federation whose processes all have the package, and whose sites allow its methods."""
    with federations(tmp_path_factory.mktemp("extended"), **environment) as federation:
        federation.coordinate()
        for site in ("hospital", "bank"):
            federation.join(site, policy='bases = ["any"]\nmethods = ["query-value", "sparse", "lora"]\n')
        yield federation


@pytest.mark.slow(alone=True)
def test_a_run_names_the_plug_ins_of_another_package(extended: Any, tmp_path: Path) -> None:
    builder, method, strategy = (Choice(name=name) for name in PLUGINS[:3])
    named = {"builders": (builder,), "method": method, "strategy": strategy}
    with extended.connect() as session:
        folder = session.submit(extended.spec(**named, public="", sites=("hospital",))).result(tmp_path / "out")
    assert "q_proj" in (folder / "adapter" / "adapter_config.json").read_text()
    assert "k_proj" not in (folder / "adapter" / "adapter_config.json").read_text()


@pytest.mark.slow(alone=True)
def test_sites_train_at_an_index_that_is_kept_while_their_values_are_averaged(extended: Any, tmp_path: Path) -> None:
    method = Choice(name="sparse", settings={"entries": 12})
    adapters = []
    with extended.connect() as session:
        for strategy in ("mean", "low-rank"):
            spec = extended.spec(method=method, strategy=Choice(name=strategy), min_sites=2, rounds=2, merge=True)
            folder = session.submit(spec).result(tmp_path / strategy)
            adapters.append(load_file(folder / "adapter" / "sparse.safetensors"))
    adapter, other = adapters
    assert len(adapter) == 2 * 7 * 2, "an index and values for each map of two layers"
    assert all(torch.equal(tensor, other[key]) for key, tensor in adapter.items()), "what is no product is averaged"
    merged = load_file(folder / "merged" / "model.safetensors")
    base = load_file(extended.material / "model" / "model.safetensors")
    for key in (key.removesuffix(".index") for key in adapter if key.endswith(".index")):
        index, values = adapter[f"{key}.index"], adapter[f"{key}.values"]
        assert index.dtype == torch.int32 and len(index.unique()) == 12 and bool(values.any())
        name = f"model.layers.{key}.weight"
        assert torch.equal(merged[name], base[name].flatten().index_add(0, index.long(), values).view_as(base[name]))


@pytest.mark.slow(alone=True)
def test_a_stage_of_another_package_that_changes_size_sends_integers_and_feeds_back(
    extended: Any, tmp_path: Path
) -> None:
    exam = {"exam": str(extended.material / "held-out.jsonl")}
    with extended.connect() as session:
        runs = []
        for upload in ((), (Choice(name="noise"), Choice(name="top", settings={"share": 0.125}))):
            spec = extended.spec(min_sites=2, rounds=2, evaluation=exam, upload=upload)
            runs.append(session.submit(spec))
            runs[-1].result(tmp_path / runs[-1].id)
    whole, top = (run.report for run in runs)
    assert top["bytes"]["up"] < 0.6 * whole["bytes"]["up"], "an eighth of the values, each with its index"
    assert top["overall"]["plug_in"] < top["overall"]["base_zero_shot"]
    assert len(top["rounds"][1]["sites"]) == 2
    for site in ("hospital", "bank"):
        left = extended.folder / "work" / site / "residuals"
        assert [folder.name for folder in left.iterdir()] == [runs[1].id]
        kept = list((left / runs[1].id).iterdir())
        names = [f"{file.stem[:2]}/{file.stem[2:]}*" for file in kept]
        assert len(kept) == 2, "what the second round began from, and what it left"
        assert all(any((extended.folder / "home" / "blobs").rglob(name)) for name in names), "each is of an update"
        for file in kept:
            stays = load_file(file)
            assert len(stays) == 2 * 7 * 2 and all(bool(tensor.any()) for tensor in stays.values())
        assert "is gone" not in extended.log(site).read_text()


def test_a_site_without_the_package_has_no_such_method_to_allow(federation: Any) -> None:
    federation.authority.issue("site", "hospital")
    policy = federation.folder / "hospital.toml"
    policy.write_text(f'bases = ["any"]\ndata = ["{federation.material}"]\nmethods = ["query-value"]\n')
    kit = str(federation.folder / "pki" / "hospital")
    asked = ["site", "join", "127.0.0.1:1", "--identity", kit, "--policy", str(policy), "--data", str(policy)]
    ended = subprocess.run([sys.executable, "-m", "offsite.client", *asked], capture_output=True, text=True)
    assert ended.returncode == 3 and "there is no method 'query-value'" in ended.stderr


@pytest.mark.slow(alone=True)
def test_the_conformance_suites_hold_it_too(environment: dict[str, str], tmp_path: Path) -> None:
    flags = ["-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'suite'}", "-k", " or ".join(PLUGINS)]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, str(TESTS / "conformance")],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | environment,
    )
    assert ended.returncode == 0, ended.stdout
    passed = int(ended.stdout.rpartition(" passed")[0].split()[-1])
    assert passed >= 70, ended.stdout
