"""Blobs in a folder and in S3, and where the bytes of each lie for good."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.store.blobs import Blobs, Folder
from offsite.coordinator.store.opening import open_blobs

DAY_S = 24 * 3600.0


class Kept:
    """Blobs, and where the bytes of each lie for good."""

    def __init__(self, blobs: Blobs, folder: Path, file: Callable[[str], Path], s3: Any = None) -> None:
        self.blobs, self.folder, self.file, self._s3 = blobs, folder, file, s3

    def take(self, content: bytes, **options: Any) -> str:
        (self.folder / "file").write_bytes(content)
        digest, size = self.blobs.take(self.folder / "file", **options)
        assert size == len(content)
        return digest

    def age(self, *digests: str, days: float = 2) -> None:
        for digest in digests:
            os.utime(self.file(digest), (time.time() - days * DAY_S,) * 2)
        if self._s3:
            self._s3.look()

    def forget(self) -> None:
        """Lose what is only here to be near."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        (self.folder / "cache" / "blake3").mkdir(parents=True)


@pytest.fixture(params=["folder", "s3"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    if request.param == "s3":
        return in_bucket(request.getfixturevalue("s3"), tmp_path)
    made = open_blobs(f"file://{tmp_path}/blobs", cache=tmp_path / "cache")
    assert isinstance(made, Folder)
    return Kept(made, tmp_path, made._place)


def in_bucket(s3: Any, folder: Path, **settings: str) -> Kept:
    url = s3.url(**settings)
    return Kept(open_blobs(url, cache=folder / "cache"), folder, lambda digest: s3.object(url, digest), s3)


@pytest.fixture
def stored(s3: Any, tmp_path: Path) -> Kept:
    """Blobs in a bucket."""
    return in_bucket(s3, tmp_path)
