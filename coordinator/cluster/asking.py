"""The process that asks a Ray cluster what it is: ``python -m offsite.coordinator.cluster.asking ADDRESS``.

It writes a JSON object with a "view" or an "error", {"status", "message"}, and is killed by an alarm where Ray's own
patience, forty seconds, would be too long (`looking.py` waits for it).
"""

import json
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

from ray import _raylet
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.state import GlobalState
from ray._private.utils import check_version_info
from ray.core.generated import autoscaler_pb2
from ray.exceptions import AuthenticationError, RpcError

from offsite.coordinator.cluster.view import VERSION_LABEL, Actor, Demand, Machine, View, here
from offsite.protos.documents import to_plain
from offsite.protos.errors import IdentityError, OffsiteError, UnreachableError

ANSWER_S = 6
core: Any = _raylet  # compiled
messages: Any = autoscaler_pb2
HEAD = "node:__internal_head__"  # a resource that Ray gives to the head alone


def main(address: str) -> dict[str, Any]:
    """Ask, and return what is written."""
    signal.alarm(ANSWER_S)
    try:
        return {"view": to_plain(_view(address))}
    except OffsiteError as error:
        return {"error": {"status": error.status, "message": str(error)}}


def _view(address: str) -> View:
    try:
        client = core.GcsClient(address=address)
    except AuthenticationError:
        raise IdentityError(
            f"the Ray cluster at {address} does not take this token, or wants one; name the file of the head's, a copy "
            "of which each machine needs"
        ) from None
    except RpcError:
        raise UnreachableError(f"what answers at {address} is not the head of a Ray cluster") from None
    about = get_cluster_metadata(client)

    reply = messages.GetClusterResourceStateReply.FromString(client.get_cluster_resource_state(timeout_s=ANSWER_S))
    state = reply.cluster_resource_state
    free = {node.node_id: dict(node.available_resources) for node in state.node_states}
    nodes = _latest(client.get_all_node_info(timeout=ANSWER_S).values())
    return View(
        address=address,
        ray=about["ray_version"],
        python=about["python_version"],
        mismatch=_mismatch(address, about),
        machines=tuple(_machine(node, free.get(node.node_id, {})) for node in nodes),
        actors=_actors(address),
        waiting=tuple(_demand(one.request, one.count) for one in state.pending_resource_requests),
    )


def _mismatch(address: str, about: dict[str, Any]) -> str:
    try:
        check_version_info(about, address)
    except RuntimeError:
        there = f"Ray {about['ray_version']} and Python {about['python_version']}"
        return (
            f"the Ray cluster at {address} runs {there}, and this machine has {here()}: they must be the same on every "
            "machine of a cluster; install here what the cluster has"
        )
    return ""


def _latest(nodes: Iterable[Any]) -> list[Any]:
    """Choose one node of each address, as one that has left may have come again; the head first."""
    last: dict[str, Any] = {}
    for node in sorted(nodes, key=lambda node: (node.state == node.ALIVE, node.start_time_ms)):
        last[node.node_manager_address] = node
    return sorted(last.values(), key=lambda node: (HEAD not in node.resources_total, node.node_manager_address))


def _machine(info: Any, free: dict[str, float]) -> Machine:
    resources, alive = _resources(info.resources_total), info.state == info.ALIVE
    return Machine(
        id=info.node_id.hex(),
        address=info.node_manager_address,
        head=HEAD in info.resources_total,
        alive=alive,
        gone="" if alive else info.death_info.reason_message or "it ended",
        offsite=info.labels.get(VERSION_LABEL, ""),
        resources=resources if alive else {},
        free={name: free.get(name, 0.0) for name in resources} if alive else {},
    )


def _resources(all_: Any) -> dict[str, float]:
    """Leave out what Ray makes up of addresses, and its store, which nobody asks for."""
    return {name: all_[name] for name in all_ if not name.startswith("node:") and name != "object_store_memory"}


def _actors(address: str) -> tuple[Actor, ...]:
    table = GlobalState()  # type: ignore[no-untyped-call]
    table._initialize_global_state(
        core.GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    return tuple(
        Actor(name=row["Name"], state=row["State"].lower(), address=row["Address"]["IPAddress"])
        for row in table.actor_table(None).values()
        if row["Name"] and row["State"] != "DEAD"
    )


def _demand(request: Any, count: int) -> Demand:
    wanted = {one.label_key: one for selector in request.label_selectors for one in selector.label_constraints}
    labels = {name: ", ".join(one.label_values) for name, one in wanted.items()}
    return Demand(count=count, resources=_resources(request.resources_bundle), labels=labels)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)  # what anything else prints
        json.dump(main(sys.argv[1]), output)
        output.flush()
        os._exit(0)  # threads of Ray's would hold it up
