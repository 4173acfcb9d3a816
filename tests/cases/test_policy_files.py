"""A site's policy files that were misread, taken literally or refused too late, and what is right."""

import shutil
from pathlib import Path

import pytest

from offsite.client.site.policy import Policy
from offsite.protos.errors import InputError

TOML = Path(__file__).parent / "toml"
WRONG = {
    "policy-bool": "max_steps: Input should be a valid integer .got True",
    "policy-data-string": "data: expected a list .got 'data'",
    "policy-methods-unknown": "there is no method 'lorra'; did you mean lora",
    "policy-min-above-max": "min_steps = 50 is more than max_steps = 10",
}


def placed(name: str, folder: Path) -> Path:
    """Lay a policy file beside a folder `data`."""
    (folder / "data").mkdir()
    return Path(shutil.copy(TOML / f"{name}.toml", folder))


@pytest.mark.parametrize(("name", "allowed"), [("policy-bom", "data"), ("policy-relative", ".")])
def test_folders_are_those_beside_the_file_wherever_it_is_read(
    name: str, allowed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = placed(name, tmp_path)
    monkeypatch.chdir("/")
    policy = Policy.load(file)
    assert policy.data == (str((tmp_path / allowed).resolve()),)
    policy.check_data(tmp_path / "data")


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name}.toml: .*{WRONG[name]}") as refused:
        Policy.load(placed(name, tmp_path))
    assert len(str(refused.value)) < 400


def test_every_file_here_is_decided() -> None:
    assert {file.stem for file in TOML.glob("policy-*")} == {*WRONG, "policy-bom", "policy-relative"}
