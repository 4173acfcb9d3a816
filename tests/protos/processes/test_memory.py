"""What a process that moves files frees stays at hand: counted in pages that it asked the system for."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from offsite.protos.processes.memory import keep_freed
if sys.argv[1] == "kept" and not keep_freed():
    sys.exit(3)
def pieces():
    for _ in range(100):
        held = [bytes(1 << 20) for _ in range(4)]
pieces()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pieces()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    child = subprocess.run([sys.executable, "-c", SCRIPT, how], stdout=subprocess.PIPE, text=True)
    if child.returncode == 3:
        pytest.skip("not glibc")
    return int(child.stdout)


def test_pieces_of_files_take_the_pages_that_others_have_freed() -> None:
    assert faults("kept") < 1000
