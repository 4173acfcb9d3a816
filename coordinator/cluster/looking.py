"""Looking at a Ray cluster from a process that does not import Ray."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

from offsite.coordinator.cluster.view import View
from offsite.protos.addresses import parse
from offsite.protos.documents import parse as read
from offsite.protos.errors import InputError, MismatchError, OffsiteError, UnreachableError, from_status

PROBE_S = 3.0  # for a connection to a port
IMPORT_S = 60.0  # for importing Ray, on a machine that is busy


def look(address: str, environment: Mapping[str, str]) -> View:
    """Ask the head at an address what its cluster is; `environment` holds the token (`admission.py`).

    Raises UnreachableError where no head answers within ten seconds, IdentityError where it does not take the token.
    """
    probe(address)
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", "offsite.coordinator.cluster.asking", address],
            env=dict(environment),
            capture_output=True,
            timeout=IMPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        answer = subprocess.CompletedProcess((), -signal.SIGALRM)
    if answer.returncode == -signal.SIGALRM:
        raise UnreachableError(
            f"what listens at {address} does not answer as the head of a Ray cluster does; look whether that is its "
            "address, and whether it is well"
        )
    if answer.returncode:
        last = answer.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise OffsiteError(f"asking the Ray cluster at {address} failed: {''.join(last)}")
    outcome = json.loads(answer.stdout)
    if error := outcome.get("error"):
        raise from_status(error["status"], error["message"])
    return read(View, outcome["view"], where=f"the Ray cluster at {address}")


def fitting(address: str, environment: Mapping[str, str]) -> View:
    """Look at a cluster that this machine may take part in; raises MismatchError where its versions differ."""
    view = look(address, environment)
    if view.mismatch:
        raise MismatchError(view.mismatch)
    return view


def inside(address: str, environment: Mapping[str, str]) -> View:
    """Look at a cluster that this machine is one of; raises InputError where it is not."""
    view = fitting(address, environment)
    check(view)
    return view


def check(view: View) -> None:
    """Refuse a cluster that this machine is not in; raises InputError."""
    alive = [machine.address for machine in view.machines if machine.alive]
    if not any(map(_own, alive)):
        raise InputError(
            f"this machine is not in the Ray cluster at {view.address} (of {', '.join(alive)}); let it join first: "
            f"`offsite cluster up --join {view.address}`"
        )


def _own(address: str) -> bool:
    """Tell whether an address is this machine's."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def probe(address: str) -> None:
    """Raise at once where nothing listens: Ray itself would try for long."""
    place = parse(address)
    try:
        socket.create_connection((place.host, place.port), timeout=PROBE_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise UnreachableError(
            f"nothing answers at the Ray cluster's address {address} ({reason}); `offsite cluster up` starts one"
        ) from None
