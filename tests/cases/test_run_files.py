"""Run files that were refused or misread, and what is right; the example in docs/ is one too."""

from pathlib import Path

import pytest

from offsite.protos.documents import from_toml
from offsite.protos.errors import InputError
from offsite.protos.spec import RunSpec

TOML = Path(__file__).parent / "toml"
WRONG = {
    'model = "m"\nround = 3': "round: there is no such field; did you mean rounds",
    'model = "m"\nrounds = true': "rounds: Input should be a valid integer .got True",
    'model = "m"\nrounds = 4294967296': "rounds: Input should be less than or equal to 2147483647",
    'model = "m"\nstall_s = inf': "inf is not a number",
    'model = "m"\nname = "a\\u001b[2Jb"': "name: must hold no control characters",
    'model = "m"\nsites = "bank"': "sites: expected a list .got 'bank'",
    'model = "m"\nmethod = "lora("': "method: recipe 'lora.', column 5: '.' was never closed",
    'model = "m"\n[training]\nseed = 9223372036854775808': "an integer beyond 9223372036854775807",
    "model = 'm'\nmodel = 'n'": "not TOML: ",
}


def test_a_file_of_a_windows_editor_is_read() -> None:
    assert from_toml(RunSpec, TOML / "run-bom.toml").model == "data"


def test_the_commented_example_is_a_run() -> None:
    assert from_toml(RunSpec, Path(__file__).parents[2] / "docs" / "run.toml").rounds == 2


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_named_with_its_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InputError, match=f"run.toml: .*{WRONG[text]}") as refused:
        from_toml(RunSpec, tmp_path / "run.toml")
    assert len(str(refused.value)) < 400
