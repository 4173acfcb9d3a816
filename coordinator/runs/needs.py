"""What a step needs of a node, and whether a node has it. Imports neither Ray nor a tensor library.

The memory is that of the tensors a step surely holds, P parameters of the base and E of the emulator, each in w bytes
as the run computes (4 in fp32, 2 in bf16):

    gather     nothing            aggregate  4 x what goes to the sites, of all tiers; join the same
    compare    2 x what goes to the sites
    build      2 x the files of the base, unless one builder works alone: that may read layer by layer; divide the same
    encode     the files of the base
    realign    2 (P + E)          evaluate   w P, with a memory the layers that train twice, or w E of the emulator
    tune       w P                attack     16 E: weights, gradients and two moments; w E where a GPU has these
    publish    2 P, and as much again for a merged model; gate 2 w P

What it computes, and the libraries (0.5 GB), come on top: that is for the node to leave free.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.steps.orders import (
    Aggregate,
    Attack,
    Build,
    Compare,
    Divide,
    Encode,
    Evaluate,
    Gate,
    Gather,
    Join,
    Order,
    Publish,
    Realign,
    Tune,
)
from offsite.coordinator.runs.steps.results import Built
from offsite.protos.errors import ResourceError

NAMED = 8  # nodes that a sentence names, at most


class NoRoom(ResourceError):
    """No node of the cluster is large enough for a step."""


@dataclass(frozen=True)
class Needs:
    """What a step asks of its node; what it does not say, any node has."""

    memory: int = 0  # bytes
    loaded: int | None = None  # of them, those that are not on a GPU, where it computes on one; None: all
    gpu: bool = False  # whether it computes on a GPU where there is one
    home: bool = False  # whether it reads files that lie beside the coordinator, and computes nothing


def of(order: Order, spec: Grant, built: Built | None) -> Needs:
    """Say what a step needs; `built` is known once the run's emulator is."""
    match order:
        case Gather():
            return Needs(home=True)
        case Build() | Divide():
            return Needs(2 * spec.weights if len(spec.builders) > 1 else 0)
        case Encode():
            return Needs(spec.weights)
        case Compare():
            return Needs(2 * sum(sent.size for sent in order.folded.last.broadcast.values()))
        case Aggregate() | Join():
            versions = order.parts if isinstance(order, Join) else (order.last,)
            return Needs(4 * sum(sent.size for version in versions for sent in version.broadcast.values()))
    return Needs() if built is None else _once_built(order, spec, built)


def _once_built(order: Order, spec: Grant, built: Built) -> Needs:
    """Say what a step needs that is about an emulator."""
    base, emulator = built.base.parameters, built.bundle.parameters
    width = 4 if spec.training.precision == "fp32" else 2
    match order:
        case Evaluate():
            twice = base * len(built.bundle.trainable) // built.base.layers if order.memory else 0
            return Needs(width * (base + twice if order.manifest is None else emulator), gpu=True)
        case Attack():
            return Needs(16 * emulator, loaded=width * emulator, gpu=True)
        case Tune():
            return Needs(width * base, gpu=True)
        case Realign():
            return Needs(2 * (base + emulator))
        case Gate():
            return Needs(2 * width * base, gpu=True)
        case Publish():
            return Needs((4 if spec.merge else 2) * base)
    raise TypeError(f"step {order.step} has no formula")


def ask(needs: Needs, nodes: Iterable[Mapping[str, float]], *, cpus: int, step: str) -> dict[str, float]:
    """Return the resources to ask for, by Ray's names, of nodes that have so much in all; raises NoRoom.

    A step that would compute on a GPU does so on the CPU where no node with one is large enough.
    """
    nodes = list(nodes)
    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    asked: dict[str, float] = {"CPU": 0 if needs.home else max(1, min(cpus, most)), "memory": needs.memory, "GPU": 0}
    loaded = needs.memory if needs.loaded is None else needs.loaded
    for one in ({**asked, "memory": loaded, "GPU": 1}, asked) if needs.gpu else (asked,):
        if room(one, nodes):
            return one
    largest = sorted(nodes, key=lambda node: -node.get("memory", 0))[:NAMED]
    raise NoRoom(
        f"step {step} needs a node with {shown(asked)}, and the largest of {len(nodes)} have "
        f"{'; '.join(map(shown, largest)) or 'nothing'}; add a larger one to the cluster, or take a smaller model"
    )


def room(asked: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """Count the nodes that have so much in all."""
    return sum(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes)


def shown(resources: Mapping[str, float]) -> str:
    """Write what a node has, or a step asks for."""
    memory = f"{resources.get('memory', 0) / 1e9:.1f} GB of memory"
    return f"{resources.get('CPU', 0):g} CPU{'s' * (resources.get('CPU', 0) != 1)} and {memory}"
