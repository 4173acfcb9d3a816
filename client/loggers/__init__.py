"""Where a run's figures go beside the screen: TensorBoard's files, an MLflow server, traces by OpenTelemetry.

A target is KIND:PLACE: `tensorboard:DIR`, `mlflow:URI` or `otlp:URL`. Each kind is in an extra of the package.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from offsite.protos.errors import InputError
from offsite.protos.events import EVENTS, Measured, RoundDone, SiteState, UpdateAccepted, read
from offsite.protos.extras import extra
from offsite.protos.figures import perplexity

if TYPE_CHECKING:
    from offsite.client.answers import Event
    from offsite.client.session import Run

KINDS = {
    "tensorboard": ("offsite.client.loggers.tensorboard:Files", "tensorboard"),
    "mlflow": ("offsite.client.loggers.mlflow:Tracking", "mlflow"),
    "otlp": ("offsite.client.loggers.otlp:Traces", "traces"),
}


class Logger(Protocol):
    """A place for the figures of one run; made of the place's name and the run."""

    def __init__(self, place: str, run: "Run") -> None: ...

    def scalar(self, name: str, value: float, *, step: int, at: float) -> None:
        """Take a figure at a step or round, counted from one, and when it was, in seconds since the epoch."""

    def close(self) -> None:
        """Write what is left, and of a run that is completed its report."""


def logged(run: "Run", events: "Iterable[Event]", targets: Sequence[str]) -> "Iterator[Event]":
    """Yield a run's events, and write their figures to each target; raises InputError, ResourceError."""
    with ExitStack() as stack:
        loggers = [_open(target, run) for target in targets]
        for logger in loggers:
            stack.callback(logger.close)
        for event in events:
            for name, value, step in scalars(event):
                for logger in loggers:
                    logger.scalar(name, value, step=step, at=event.at)
            yield event


def scalars(event: "Event") -> Iterator[tuple[str, float, int]]:
    """Yield the figures in an event by name, and at which step of a site's, or round, each is."""
    if event.kind not in EVENTS:
        return
    try:
        told = read(event.kind, event.data, round=event.round, site=event.site)
    except InputError:  # of another version
        return
    match told:
        case SiteState(state="training", loss=float(loss)) as state:
            yield f"loss/{state.site}", loss, (state.round - 1) * state.steps + state.step
        case UpdateAccepted() as update:
            yield f"update/{update.site}/loss", update.loss, update.round
            yield f"update/{update.site}/bytes", update.bytes, update.round
            yield f"update/{update.site}/examples", update.examples, update.round
        case Measured() as figure:
            yield f"perplexity/{figure.name}/overall", perplexity(figure.sets.values()), event.round
            for name, score in figure.sets.items():
                yield f"perplexity/{figure.name}/{name}", perplexity([score]), event.round
        case RoundDone() as done:
            yield "round/sites", done.sites, done.round
            yield from (
                (f"round/{name}", value, done.round) for name, value in done.figures.items() if value is not None
            )


def _open(target: str, run: "Run") -> Logger:
    kind, colon, place = target.partition(":")
    if kind not in KINDS or not place:
        raise InputError(f"{target}: expected tensorboard:DIR, mlflow:URI or otlp:URL")
    home, needed = KINDS[kind]
    module, _, name = home.partition(":")
    with extra(needed, option=target):
        logger: Any = getattr(import_module(module), name)
    made: Logger = logger(place, run)
    return made
