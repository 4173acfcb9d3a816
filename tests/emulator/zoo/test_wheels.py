import hashlib
import importlib.util
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from offsite.emulator.zoo.wheels import fetch

NAME = "some_texts-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the package index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with ZipFile(folder / NAME, "w") as archive:
        archive.writestr("some_texts/a.txt", "text")
        archive.writestr("some_texts-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-texts\nVersion: 1.0\n")
        archive.writestr("some_texts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_texts-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_downloaded_once_and_then_read_from_the_cache(index: Path, tmp_path: Path) -> None:
    expected = sha256(index / NAME)
    wheel = fetch("some-texts==1.0", expected, cache=tmp_path / "cache")
    assert sha256(wheel) == expected
    (index / NAME).unlink()
    assert fetch("some-texts==1.0", expected, cache=tmp_path / "cache") == wheel
    assert [path.name for path in wheel.parent.iterdir()] == [NAME]


def test_a_damaged_wheel_in_the_cache_is_replaced(index: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cache" / "wheels" / NAME
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half a wheel")
    assert sha256(fetch("some-texts==1.0", sha256(index / NAME), cache=tmp_path / "cache")) == sha256(index / NAME)


def test_a_wheel_with_another_hash_is_not_kept(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{NAME} from pip has SHA-256 {sha256(index / NAME)}, expected {'0' * 64}"):
        fetch("some-texts==1.0", "0" * 64, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_failed_download_says_what_pip_said_and_where_to_put_the_file(index: Path, tmp_path: Path) -> None:
    (index / NAME).unlink()
    with pytest.raises(ValueError, match="No matching distribution found for some-texts==1.0") as caught:
        fetch("some-texts==1.0", "0" * 64, cache=tmp_path / "cache")
    assert f"put some_texts-1.0-*.whl (SHA-256 {'0' * 64}) into {tmp_path / 'cache' / 'wheels'}" in str(caught.value)


def test_without_pip_the_message_says_so(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="has no pip. To provide it by hand, put some_texts") as caught:
        fetch("some-texts==1.0", "0" * 64, cache=tmp_path)
    assert sys.executable in str(caught.value)
