"""What a person sees of a run under way: one live screen on a terminal, plain lines elsewhere, or JSON lines."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from offsite.client.answers import Event
from offsite.client.figures import short
from offsite.protos.documents import plain
from offsite.protos.errors import InputError
from offsite.protos.events import (
    EVENTS,
    EmulatorBuilt,
    Examined,
    Held,
    Measured,
    Released,
    RoundBegun,
    RoundDone,
    Selected,
    SiteOut,
    SiteState,
    StepBegun,
    StepLost,
    Stopped,
    UpdateAccepted,
    Usage,
    Waiting,
    Warned,
    Withdrawn,
    read,
)
from offsite.protos.exams import Exam
from offsite.protos.figures import FIGURES, perplexity, title, without_infinities
from offsite.protos.spec import RunSpec

PHASES = {  # of steps that measure no figure
    "version:0": "building the emulator",
    "bundle": "tuning the emulator beside the new adapter",
    "publish": "writing the adapter",
    "gate": "holding the outcome against the gate",
}
LINE_EVERY_S = 10.0  # where there is no live screen


@dataclass
class SiteView:
    """What is known of a site."""

    state: str = "waiting"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass
class RunView:
    """What is known of a run, built up from its events."""

    spec: RunSpec
    phase: str = "waiting for sites"
    round: int = 0
    started: float = field(default_factory=time.time)
    now: float = 0.0  # of the event that is taken
    training_since: float | None = None
    steps_done: int = 0
    sites: dict[str, SiteView] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def take(self, event: Event) -> str:
        """Add an event; return a line that tells it, or an empty one for what is only progress."""
        teller = getattr(self, f"_on_{event.kind}", None)
        if event.kind not in EVENTS or teller is None:
            return ""
        try:
            self.now = event.at
            return plain(teller(read(event.kind, event.data, round=event.round, site=event.site)))
        except (ArithmeticError, InputError):  # of another version, or of one who lies
            return plain(f"{event.kind}: {event.data}", most=200)

    def _on_selected(self, event: Selected) -> str:
        self.sites = {name: SiteView() for name in event.sites}
        return f"sites: {', '.join(self.sites)}"

    def _on_step(self, event: StepBegun) -> str:
        name = event.step.partition(":")[0]
        figure = FIGURES.get(name)
        self.phase = figure.phase if figure else PHASES.get(event.step, PHASES.get(name, "averaging the updates"))
        return self.phase

    def _on_lost(self, event: StepLost) -> str:
        return f"begins again: {event.message}"

    def _on_bundle(self, event: EmulatorBuilt) -> str:
        size, share = event.bytes / 1e6, event.disclosed
        emulator = f"emulator: {len(event.layers)} layers, {size:.0f} MB, {share:.0%} of the base's parameters"
        return f"{emulator}; computed in {event.computed}; learning rate {event.learning_rate:g}"

    def _on_figure(self, event: Measured) -> str:
        value = perplexity(event.sets.values())
        self.figures[event.name] = value
        return f"{title(event.name)}: perplexity {value:.2f}"

    def _on_waiting(self, event: Waiting) -> str:
        here = ", ".join(event.present) or "nobody"
        return f"waiting for {', '.join(event.sites) or 'more sites'} (here: {here})"

    def _on_warning(self, event: Warned) -> str:
        return f"warning: {event.message}"

    def _on_begun(self, event: RoundBegun) -> str:
        for name in event.joined:
            self.sites.setdefault(name, SiteView())
        return f"round {event.round}: {', '.join(event.joined)} joins the run" if event.joined else ""

    def _on_out(self, event: SiteOut) -> str:
        self.sites.setdefault(event.site, SiteView()).state = "out"
        return f"{event.site} takes part no longer ({event.by}): {event.reason}"

    def _on_site(self, event: SiteState) -> str:
        site = self.sites.setdefault(event.site, SiteView())
        before = site.state
        self.round, site.state = event.round, event.state
        if site.state in ("downloading", "loading"):
            self.phase = "training at the sites"
        if site.state == "training" and event.step:
            self.training_since = self.training_since or self.now
            self.steps_done += max(0, event.step - site.step) if before == "training" else event.step
            site.step, site.steps = event.step, event.steps
            site.loss = site.loss if event.loss is None else event.loss
        site.bytes_down = max(site.bytes_down, event.bytes_down)
        if site.state in ("refused", "failed", "stalled", "left out", "late", "folded"):
            return "\n    ".join(
                [f"round {event.round}: {event.site} {site.state}: {event.message}", *(event.lines or ())]
            )
        used = f" ({_used(event.usage)})" if event.usage else ""
        return f"round {event.round}: {event.site} {site.state}{used}" if before != site.state else ""

    def _on_update(self, event: UpdateAccepted) -> str:
        site = self.sites.setdefault(event.site, SiteView())
        site.state, site.bytes_up, site.loss = "done", site.bytes_up + event.bytes, event.loss
        upload = f"uploaded {event.bytes / 1e6:.2f} MB after {event.examples} examples, mean loss {event.loss:.3f}"
        return f"round {event.round}: {event.site} {upload}{examined(event.exam)}"

    def _on_exam(self, event: Examined) -> str:
        return f"round {event.round}: {event.site} measured its version{examined(event.exam)}"

    def _on_round(self, event: RoundDone) -> str:
        error, above = (event.figures.get(name) for name in ("factor_mean_error", "energy_above_smallest_rank"))
        more = f" (averaging factors instead of products would have been {error:.1%} off)" if error else ""
        more = f" ({above:.1%} of the mean's energy is above the smallest rank, and kept)" if above else more
        for site in self.sites.values():
            site.state, site.step = "waiting", 0
        return f"round {event.round}: {event.sites} updates averaged{more}"

    def _on_stopped(self, event: Stopped) -> str:
        return f"{event.message}; the best is that of round {event.best}"

    def _on_held(self, event: Held) -> str:
        return f"held back by the gate, so that nothing is published: {event.message}"

    def _on_released(self, event: Released) -> str:
        return f"{f'round {event.round}' if event.round else 'all of it'} was released by {event.by}: {event.reason}"

    def _on_withdrawn(self, event: Withdrawn) -> str:
        return f"round {event.round}: its version was taken back by {event.by}: {event.reason}"

    def time_left(self) -> float | None:
        """Seconds of training left at the pace so far; None before there is a pace."""
        total = self.spec.rounds * self.spec.training.steps * max(1, len(self.sites))
        if self.training_since is None or not self.steps_done:
            return None
        return (time.time() - self.training_since) / self.steps_done * max(0, total - self.steps_done)

    def steps_line(self) -> str:
        """Say in a line how far the sites are."""
        sites = ", ".join(f"{name} {site.step}/{site.steps}" for name, site in self.sites.items() if site.steps)
        return f"round {self.round}: steps {sites}; about {self.time_left() or 0:.0f} s of training left"

    def __rich__(self) -> RenderableType:
        """Draw the run as it stands."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("site", "state", "step", "loss", "MB down", "MB up"):
            table.add_column(
                column,
                justify="left" if column in ("site", "state") else "right",
                style="bold" if column == "site" else "",
            )
        for name, site in self.sites.items():
            step = f"{site.step}/{site.steps}" if site.steps else ""
            loss = short(site.loss, 3)
            table.add_row(name, site.state, step, loss, f"{site.bytes_down / 1e6:.1f}", f"{site.bytes_up / 1e6:.2f}")
        left = self.time_left()
        clock = f"{time.time() - self.started:.0f} s" + (f", about {left:.0f} s of training left" if left else "")
        head = Text(f"round {max(1, self.round)} of {self.spec.rounds} - {self.phase} - {clock}", style="bold cyan")
        return Group(head, table)


def examined(exam: Exam | None) -> str:
    """Say how an exam at a site went, as the end of a line; nothing where there was none."""
    if exam is None:
        return ""
    values = [short(perplexity([score])) for score in (exam.before, exam.after) if score is not None]
    return f"; perplexity of its {exam.rows} held-out rows {' -> '.join(values)}"


def clock(at: float) -> str:
    """Say when something was, on this machine's clock; seconds since the epoch where a clock does not reach."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return f"{at:g} s"


@contextmanager
def screen(console: Console, view: RenderableType) -> Iterator[None]:
    """Keep a view on the screen while the body runs; nothing on a console that is no terminal."""
    if not console.is_terminal:
        yield
        return
    with Live(view, console=console, refresh_per_second=4, transient=True):
        yield


def follow(events: Iterable[Event], spec: RunSpec, *, console: Console, format: str = "text") -> RunView:
    """Show events as they come, until they end; `format` is text or json (one event a line)."""
    view = RunView(spec)
    if format == "json":
        for event in events:
            view.take(event)
            print(json.dumps(without_infinities(vars(event))[0]), flush=True)
        return view
    last_at = 0.0
    with screen(console, view):
        for event in events:
            line = view.take(event)
            if not line and not console.is_terminal and event.at - last_at > LINE_EVERY_S and view.steps_done:
                line = view.steps_line()
            if line:
                last_at = event.at
                console.print(Text.assemble((clock(event.at)[11:], "dim"), "  ", line))
    return view


def _used(usage: Usage) -> str:
    gpu = f", {usage.gpu_bytes / 1e9:.2f} GB on its GPU" if usage.gpu_bytes else ""
    return f"{usage.memory_bytes / 1e9:.2f} GB of memory, {usage.cpu_s:.0f} s of processor{gpu}"
