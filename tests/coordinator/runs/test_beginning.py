"""The version that a run begins from, where that is another run's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.coordinator.bundles.manifests import describe
from offsite.coordinator.bundles.stored import store_adapter
from offsite.coordinator.home import Home
from offsite.coordinator.runs.steps.beginning import go_on
from offsite.coordinator.runs.steps.orders import Continued
from offsite.coordinator.runs.steps.results import Built
from offsite.coordinator.runs.steps.storage import store_schema
from offsite.coordinator.runs.versions import Version
from offsite.coordinator.store.blobs import Stored
from offsite.kernels.schema import Field, Rule, Schema
from offsite.protos.chunks import digest_bytes
from offsite.protos.errors import MismatchError
from offsite.protos.spec import BaseRef, Choice, Manifest

OTHER = digest_bytes(b"other")
BASE = BaseRef(name="m", digest=digest_bytes(b"base"), layers=3, parameters=9)
MANIFEST = Manifest(
    **{"base": BASE, "builders": (Choice(name="any"),), "layers": (0, 2), "trainable": (0,), "files": ()},
    **{"parameters": 6, "verbatim": 6, "lossy": 0},
)
SCHEMA: Schema = {
    "0.q.A": Field("F32", (None, 6), Rule.PRODUCT, "0.q"),
    "0.q.B": Field("F32", (4, None), Rule.PRODUCT, "0.q"),
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", tmp_path / "kit").prepare()


def sent(home: Home, rank: int, *, size: int = 6) -> Stored:
    adapter = {"0.q.A": torch.rand(rank, size), "0.q.B": torch.rand(4, rank)}
    return store_adapter(home.blobs(), home.node.scratch / "adapter", adapter)


@pytest.fixture
def built(home: Home) -> Built:
    """What was built for sites of one tier."""
    start = sent(home, 2)
    return Built(
        manifest=OTHER,
        manifest_size=1,
        bundle=describe(MANIFEST),
        base=BASE,
        version=Version(adapter=start.digest, broadcast={"r2": start}),
        tiers={"ward": "r2"},
        schema=store_schema(home.blobs(), home.node.scratch, SCHEMA),
        update_sizes={"r2": 1},
        method=Choice(name="lora"),
        method_hash=OTHER,
        learning_rate=0.01,
        computed="fp32",
        recovery=None,
    )


@pytest.fixture
def last(home: Home) -> Continued:
    """A version for sites of two tiers."""
    version = Version(
        adapter=sent(home, 3).digest,
        broadcast={"r2": sent(home, 2), "r3": sent(home, 3)},
        state={"residual.r2": sent(home, 1).digest},
        figures={"residual": 0.5},
    )
    return Continued(version=version, base=BASE.digest, trainable=(0,), recovery=None)


def test_a_run_goes_on_with_what_its_own_sites_start_from_and_all_that_was_kept(
    home: Home, built: Built, last: Continued
) -> None:
    version = go_on(home.blobs(), built, last)
    assert version.broadcast == {"r2": last.version.broadcast["r2"]} and version.figures == {}
    assert (version.adapter, version.state) == (last.version.adapter, last.version.state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": OTHER}, f"is of base {OTHER}, what was built {BASE.digest}"),
        ({"trainable": (0, 2)}, r"is of layers \[0, 2\], what was built \[0\]"),
        ({"recovery": OTHER}, f"is brought to the base by {OTHER}, what was built None"),
    ],
)
def test_a_version_of_something_else_is_refused(
    home: Home, built: Built, last: Continued, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(MismatchError, match=f"the version to go on from {words}"):
        go_on(home.blobs(), built, replace(last, **changes))


def test_a_version_that_does_not_fit_what_was_built_or_its_sites_is_refused(
    home: Home, built: Built, last: Continued
) -> None:
    other = replace(built, version=replace(built.version, broadcast={"r8": sent(home, 8)}))
    with pytest.raises(MismatchError, match=r"has nothing for sites of tier r8, only of \['r2', 'r3'\]"):
        go_on(home.blobs(), other, last)
    narrow = replace(last, version=replace(last.version, broadcast={"r2": sent(home, 2, size=5)}))
    with pytest.raises(MismatchError, match=r"tier r2: tensor 0.q.A is F32 \[2, 5\], expected F32 \[2, 6\]"):
        go_on(home.blobs(), built, narrow)
