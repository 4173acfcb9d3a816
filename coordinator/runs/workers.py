"""The coordinator's process on Ray: it starts supervisors there as actors, and looks whether Ray is well.

It hears runs' ids on stdin, ends when that is closed, and says on a pipe that it has
imported Ray, that it is ready, then every few seconds that all is well, or what is not (`cluster.py` listens).

A supervisor is a detached, named actor: it outlives the server that asked for it. Ray restarts a dead actor with empty
memory by running its constructor again, so the constructor itself starts the work and the journal supplies the state.
A step is a Ray task, so that Ray finds the node and counts the CPU; its work is done in a process forked for it, from
one of that node that has imported the tensor libraries. So a step begins at once, all its memory is free with its end,
that of a GPU too, and Ray's own processes stay small.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offsite.coordinator.cluster.view import VERSION_LABEL, label
from offsite.coordinator.home import Home
from offsite.coordinator.node import Node
from offsite.coordinator.runs import forking
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.needs import Needs, ask, of, room, shown
from offsite.coordinator.runs.shards import count, in_parts
from offsite.coordinator.runs.steps.orders import Order, read
from offsite.coordinator.runs.supervisor import Lost, Supervisor
from offsite.protos.chunks import digest_bytes, hex_of
from offsite.protos.documents import from_json, plain, to_json
from offsite.protos.errors import ResourceError, from_system
from offsite.protos.telemetry.logs import Form, begin, subject

BEAT_S = 2.0
PROBE_S = 5.0
SWEEP_EVERY_S = 6 * 3600.0  # a node's folder, of what kills left there
WAITS_S = 5.0  # that a step waits for its node without a word
AGAIN_S = 2.0  # before a supervisor that could not go on is started again


def main() -> None:
    """Join Ray and serve until stdin is closed or Ray is gone."""
    root, identity, address, threads, part, form, pipe = sys.argv[1:]
    with os.fdopen(int(pipe), "w", buffering=1) as channel:
        try:
            print("imported", file=channel)
            _join(address, root)
            _steps(Home(Path(root), Path(identity)).node)
            obeyed = (channel, root, identity, int(threads), int(part), form)
            threading.Thread(target=_obey, args=obeyed, daemon=True).start()
            print("ready", file=channel)
            _beat(channel)
        except Exception as error:  # whatever it is, it must be said: nobody reads this process's output
            print(f"error: {_sentence(error)}", file=channel)
    os._exit(1)  # now: what Ray has in other threads may hang


def _join(address: str, root: str) -> None:
    """Join a cluster, or start one that listens on loopback alone."""
    local: dict[str, Any] = {}
    if not address:  # all of this machine's memory may be asked for: what is more than that is said to be too large
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "_memory": memory}
        local["labels"] = {VERSION_LABEL: label()}
    listens = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if local and listens != "127.0.0.1":
        raise RuntimeError(f"it would listen on {listens} instead of loopback")
    ray.init(
        address=address or "local",
        namespace=f"offsite-{hex_of(digest_bytes(root.encode()), most=16)}",  # this coordinator's own supervisors
        log_to_driver=False,
        logging_level=logging.ERROR,
        **local,
    )
    for name in ray.util.list_named_actors():
        if name.startswith("run-") and not name.endswith(_node()):  # another machine's, which looked after them before
            ray.kill(ray.get_actor(name), no_restart=True)


def _nodes() -> list[dict[str, Any]]:
    """Return the nodes that can do steps."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"] and _fits(node)]


def _fits(node: dict[str, Any]) -> bool:
    """Tell whether a node has this version: it is the one that this process is on, or says so by its label."""
    return bool(node["NodeID"] == _node() or node["Labels"].get(VERSION_LABEL) == label())


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _beat(channel: TextIO) -> None:
    """Say every few seconds that Ray is well, and which machines come and go; raises when it is not well."""
    context = ray.get_runtime_context()
    known: set[str] = set()
    while True:
        _connect("its head (GCS)", context.gcs_address)
        nodes = {node["NodeID"]: node for node in ray.nodes()}  # type: ignore[no-untyped-call]
        alive = {name for name, node in nodes.items() if node["Alive"]}
        if _node() not in alive:
            raise RuntimeError("this machine is no longer one of its nodes")
        here = nodes[_node()]
        _connect("its raylet on this machine", f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}")
        if alive != known:
            _bury(alive)
            for name in sorted(known ^ alive if known else alive):
                if words := _news(nodes[name], name in known - alive):
                    print(f"warning: {words}", file=channel)
        known = alive
        print("well", file=channel)
        time.sleep(BEAT_S)


def _bury(alive: set[str]) -> None:
    """End what is named after a node that is gone, and would wait for it for ever."""
    for name in ray.util.list_named_actors():
        if name.rpartition("-")[2] not in alive:
            ray.kill(ray.get_actor(name), no_restart=True)


def _news(node: dict[str, Any], gone: bool) -> str:
    """Say what there is to say of a machine that has left or come; empty if it is as the others."""
    where = f"machine {node['NodeManagerAddress']}"
    if gone:
        why = plain(node["DeathReasonMessage"].strip() or "it ended", most=100)
        return f"{where} has left the cluster ({why}); steps that were under way there begin again on another"
    if _fits(node):
        return ""
    version = node["Labels"].get(VERSION_LABEL)
    return f"{where} has {f'Offsite {version}' if version else 'no Offsite that it tells of'}; no step is done there"


def _connect(what: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise RuntimeError(f"{what}, at {address}, is gone ({error.strerror or error})") from None


def _obey(channel: TextIO, root: str, identity: str, threads: int, part: int, form: Form) -> None:
    """Start the supervisors that are asked for, until nobody can ask any more."""
    try:
        for line in sys.stdin:
            run = line.strip()
            _here(_Supervisor, f"run-{run}", root, identity, run, threads, part, form)  # beside the journal
        ray.shutdown()
        os._exit(0)
    except Exception as error:
        print(f"error: {_sentence(error)}", file=channel)
        os._exit(1)


def _sentence(error: Exception) -> str:
    return plain(str(error).strip() or type(error).__name__, most=300)


def _here(kind: Any, name: str, *arguments: Any) -> Any:
    """Return an actor of this node by its name; it is made if it is not there, and again should it die."""
    return kind.options(
        name=f"{name}-{_node()}",
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(_node(), soft=False),
    ).remote(*arguments)


def _steps(node: Node) -> Any:
    """Return the actor that holds what this node's steps are forked from; it starts that with itself."""
    return _here(_Steps, "steps", node)


@ray.remote
class _Supervisor:
    def __init__(self, root: str, identity: str, run: str, threads: int, part: int, form: Form) -> None:
        begin(form, run=run)
        self._threads, self._part, self._form = threads, part, form
        self._home, self._run = Home(Path(root), Path(identity)), run
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            self._supervisor = Supervisor(self._home, self._run, perform=self._perform)
            self._supervisor.run()
        except BaseException:  # not the run's end: Ray starts this actor again, and it reads the journal
            logging.getLogger(__name__).exception("the supervisor starts again")
            time.sleep(AGAIN_S)
            os._exit(1)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _perform(self, step: str, spec: bytes, order: bytes, needs: Needs) -> bytes:
        try:
            return self._placed(read(step, order), spec, needs)
        except RayTaskError as error:
            raise _lost(error.cause) if isinstance(error.cause, RayError) else error.cause from None
        except RayError as error:  # a worker or the cluster went away, not the step
            raise _lost(error) from error

    def _placed(self, order: Order, spec: bytes, needs: Needs) -> bytes:
        """Do a step on a node that has what it needs, or in parts on several; raises NoRoom if there is none."""
        grant, home = from_json(Grant, spec, where="run spec"), needs.home or not self._home.node.shared
        nodes = [node["Resources"] for node in _nodes() if not home or node["NodeID"] == _node()]
        whole = ask(needs, nodes, cpus=self._threads or 1, step=order.step)
        parts = count(order, grant, nodes=room(whole, nodes), part=self._part)
        anywhere = "SPREAD" if parts > 1 else "DEFAULT"

        def do(orders: Sequence[Order]) -> list[bytes]:
            """Do orders of one kind, side by side."""
            step, asked = orders[0].step, whole
            if step != order.step:
                asked = ask(of(orders[0], grant, None), nodes, cpus=self._threads or 1, step=step)
            task = _perform.options(
                num_cpus=asked["CPU"],
                num_gpus=asked["GPU"],
                memory=asked["memory"] or None,
                scheduling_strategy=NodeAffinitySchedulingStrategy(_node(), soft=False) if home else anywhere,
                label_selector=None if home else {VERSION_LABEL: label()},
            )
            here = (self._threads, self._home.node, _node(), {"form": self._form, "about": subject() | {"step": step}})
            streams: list[Any] = [task.remote(*here, step, spec, to_json(one)) for one in orders]
            self._begin(streams, f"step {step} waits until a node has {shown(asked)} free")
            return [bytes(ray.get(next(stream))) for stream in streams]

        return in_parts(order, grant, parts, do)

    def _begin(self, streams: list[Any], note: str) -> None:
        """Wait until each of some tasks has begun; if that takes a while, the run says so.

        A run that is cancelled meanwhile raises Cancelled; its tasks end with this actor.
        """
        waits = ray.wait(streams, num_returns=len(streams), timeout=WAITS_S)[1]
        if waits:
            self._supervisor.waits(note)
            while waits:
                self._supervisor.heed()
                waits = ray.wait(streams, num_returns=len(streams), timeout=WAITS_S)[1]
            self._supervisor.waits("")
        for stream in streams:
            ray.get(next(stream))


def _lost(error: RayError) -> Lost:
    """Say what went away: Ray's first sentence of it, without where it was raised."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Lost(f"{type(error).__name__}: {plain(first.strip(), most=300)}")


@ray.remote
class _Steps:
    def __init__(self, node: Node) -> None:
        self._node, self._swept = node, 0.0
        self._server = forking.fork_server(node)

    def start(self) -> None:
        """Have steps find what they are forked from; raises OSError, or ResourceError, which an actor outlives."""
        self._node.prepare()
        self._server.start()  # unless it runs
        if time.monotonic() - self._swept > SWEEP_EVERY_S:
            self._node.sweep()
            self._swept = time.monotonic()


@ray.remote(max_retries=0, num_returns="streaming")  # the supervisor tries again, and counts
def _perform(
    threads: int, home: Node, at: str, log: dict[str, Any], step: str, spec: bytes, order: bytes
) -> Iterator[bytes]:
    """Yield nothing as soon as a node does the step, then its result."""
    yield b""
    node = home if at == _node() else _elsewhere(home.url)
    _ready(node)
    gpus = ",".join(map(str, ray.get_gpu_ids()))  # that are this step's, and no other's
    yield forking.perform(threads, node, step, spec, order, log=log, CUDA_VISIBLE_DEVICES=gpus)


def _ready(node: Node) -> None:
    """Have a node ready to do steps; raises ResourceError with what keeps this machine from it."""
    try:
        ray.get(_steps(node).start.remote())
    except RayTaskError as error:
        if not isinstance(error.cause, OSError | ResourceError):
            raise
        fault = from_system(error.cause) if isinstance(error.cause, OSError) else error.cause
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        raise ResourceError(f"machine {address} can do no steps: {fault}") from None


def _elsewhere(url: str) -> Node:
    """Return this machine's folder for a coordinator whose home is on another one."""
    from offsite.emulator.zoo import cache_folder  # the hub's client: not in each of Ray's processes

    whose = f"{ray.get_runtime_context().namespace} {url}"
    return Node(cache_folder() / "nodes" / hex_of(digest_bytes(whose.encode()), most=16), url)


if __name__ == "__main__":
    from offsite.coordinator.runs import workers  # under its own name, by which Ray's processes import it

    workers.main()
