"""Supervisors and steps on Ray. The one file that imports it.

A supervisor is a detached, named actor: it outlives the server that asked for it. Ray restarts a dead actor with empty
memory by running its constructor again, so the constructor itself starts the work and the journal supplies the state.
Steps are Ray tasks, so that their memory is freed with their worker and the actor stays small.
"""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offsite.coordinator.home import Home
from offsite.coordinator.supervisor import Lost, Supervisor
from offsite.protos.errors import ResourceError

NAMESPACE = "offsite"


class OnRay:
    """Supervisors as detached actors of a Ray cluster, or of one started for this process on loopback."""

    def __init__(self, home: Home, *, address: str | None = None, threads: int = 0) -> None:
        self._home = home
        self._threads = threads
        if address is None:
            # Without it Ray rewrites 127.0.0.1 to the machine's routable address and listens there.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        local: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address is None else {}
        where = address or "this machine"
        try:
            ray.init(
                address=address or "local",
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
        except (RuntimeError, ConnectionError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ResourceError(f"Ray did not start on, or could not be joined at, {where}: {reason}") from None

    def supervise(self, run: str) -> None:
        """Find or start the actor of a run."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # by the journal
        actor = _Actor.options(  # type: ignore[attr-defined]
            name=f"run-{run}",
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=here,
        )
        actor.remote(str(self._home.root), str(self._home.identity), run, self._threads)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        ray.shutdown()


@ray.remote
class _Actor:
    def __init__(self, root: str, identity: str, run: str, threads: int) -> None:
        self._threads = threads
        supervisor = Supervisor(Home(Path(root), Path(identity)), run, perform=self._perform)
        threading.Thread(target=self._work, args=(supervisor,), daemon=True).start()

    def _work(self, supervisor: Supervisor) -> None:
        try:
            supervisor.run()
        except BaseException:  # not the run's end: Ray starts this actor again, and it reads the journal
            logging.getLogger(__name__).exception("the supervisor starts again")
            os._exit(1)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _perform(self, *arguments: Any) -> dict[str, Any]:
        try:
            gave: dict[str, Any] = ray.get(_perform.remote(self._threads, *arguments))
        except RayTaskError:
            raise
        except RayError as error:  # a worker or the cluster went away, not the step
            raise Lost from error
        return gave


@ray.remote(num_cpus=1, max_retries=3)
def _perform(threads: int, *arguments: Any) -> dict[str, Any]:
    import torch

    from offsite.coordinator.work import perform

    torch.set_num_threads(threads or os.cpu_count() or 1)  # Ray would leave one thread per CPU asked for
    return perform(*arguments)
