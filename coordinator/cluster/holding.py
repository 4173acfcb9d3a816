"""The process that holds a machine in a Ray cluster: `ray start --block`, tied to the process that started it.

It is ended by a signal, by that process's end, and by the end of anything of Ray's that it has started, which it takes
with it.
"""

import ctypes
import os
import signal
import sys
from typing import Any

from ray.scripts.scripts import main

PR_SET_PDEATHSIG = 1


def without_client(parameters: Any, head: bool) -> None:
    """Have Ray start no server for its own clients from afar: a way in that nothing here uses (`RAY_START_HOOK`)."""
    parameters.ray_client_server_port = None


if __name__ == "__main__":
    parent = int(sys.argv.pop(1))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    os.environ["RAY_START_HOOK"] = "offsite.coordinator.cluster.holding.without_client"
    main()  # type: ignore[no-untyped-call]
