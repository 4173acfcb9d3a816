"""What steps do with a run's memory: what it is given, what is kept of it, and what a run without one forgets."""

from pathlib import Path

import pytest
import torch

from offsite.coordinator import aggregation
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.storage import load_version, store_version
from offsite.coordinator.runs.versions import Version
from offsite.kernels.schema import Field, Rule, Schema

SCHEMA: Schema = {"0.norm": Field("F32", (3,), Rule.MEAN)}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "node", f"file://{tmp_path}/blobs").prepare()


@pytest.fixture
def last(node: Node, tmp_path: Path) -> Version:
    """A version with what a strategy has kept, and a memory."""
    adapter = {"0.norm": torch.arange(3.0)}
    state = {"residual.": {"0.norm": torch.ones(3)}, "memory.old": {"0.norm": torch.zeros(3)}}
    return store_version(node.blobs(), tmp_path, aggregation.Version(adapter, {"": adapter}, state))


def test_a_strategy_is_given_what_strategies_keep(last: Version) -> None:
    assert last.bare.state == {"residual.": last.state["residual."]} and last.bare.broadcast == last.broadcast


def test_a_run_without_a_memory_forgets_that_of_the_run_it_goes_on_from_and_nothing_else(
    node: Node, last: Version, tmp_path: Path
) -> None:
    begun = memory.begin(node.blobs(), tmp_path, Grant(model="m"), last, SCHEMA)
    assert begun == last.bare != last
    new = load_version(node.blobs(), begun)
    assert memory.after(node.blobs(), Grant(model="m"), begun, new, SCHEMA, number=0) is new
