"""How long to fuzz: a short run of always the same inputs beside the other tests, or a long one of new ones.

OFFSITE_FUZZ=200000 pytest -n 0 tests/fuzz --hypothesis-profile=long
"""

import os
import resource
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

GROWTH_MIB = 1024  # what fuzzing may add to this process's memory, whatever it is fed

COMMON = settings(database=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.register_profile("short", COMMON, derandomize=True, deadline=None, max_examples=60)
settings.register_profile("long", COMMON, deadline=20_000, max_examples=int(os.environ.get("OFFSITE_FUZZ", "100000")))
settings.load_profile("short")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Fail where inputs made this process grow without bounds."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_MIB << 10
