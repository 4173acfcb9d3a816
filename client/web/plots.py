"""Plots and graphs as SVG's numbers: where lines, ticks and boxes are. The templates draw them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from offsite.client.answers import Version
from offsite.client.figures import short
from offsite.client.web.story import Story
from offsite.protos.figures import BASE_ZERO_SHOT, FIGURES, PLUG_IN, perplexity, title

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 220, 64, 12, 12, 40  # pixels
POINTS = 320  # of a line: more than two pixels apart
TOLD_APART = 6  # sites that have a line each
COLOURS = ("#1b7f5c", "#3f6fb5", "#a8631f", "#7d559e", "#b5473f", "#5d6b7a")
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 176, 74, 64, 18

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A line; `level` is one that holds for all of the plot, drawn dashed."""

    name: str
    colour: str
    points: Points
    level: bool = False


@dataclass(frozen=True)
class Axis:
    """What goes from `low` to `high` over the pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Return the pixels of round values, and these as text."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [part * 10.0**decade for decade in decades for part in (1, 2, 5)]
            values = [value for value in values if self.low <= value <= self.high]
            values = values[:: math.ceil(len(values) / most)] if values else [self.low, self.high]
        else:
            raw = (self.high - self.low) / most
            unit = 10.0 ** math.floor(math.log10(raw))
            step = next(part * unit for part in (1, 2, 5, 10) if part * unit >= raw * 0.999)
            values = [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self.at(value), f"{value:,.12g}") for value in values]


@dataclass(frozen=True)
class Plot:
    """Lines over the rounds of a run, and a band if there are many of them."""

    title: str
    unit: str
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]
    band: Points = ()

    def path(self, points: Points) -> str:
        """Return the points of a polyline or polygon, thinned where they are too many to see."""
        every = math.ceil(len(points) / POINTS)
        kept = [*points[::every], *([points[-1]] if every > 1 else [])]
        return " ".join(f"{self.x.at(x)},{self.y.at(y)}" for x, y in kept)

    @property
    def words(self) -> str:
        """Say what is to be seen."""
        lines = (
            f"{one.name} {short(one.points[-1][1])}"
            if one.level or len(one.points) < 2
            else f"{one.name} from {short(one.points[0][1])} to {short(one.points[-1][1])}"
            for one in self.curves
        )
        return f"{self.title}, {self.unit}: {'; '.join(lines)}."


def _plot(title: str, unit: str, rounds: int, curves: list[Curve], *, band: Points = (), log: bool = False) -> Plot:
    shown = [Curve(c.name, c.colour, _drawn(c.points, log), c.level) for c in curves]
    shown = [curve for curve in shown if curve.points]
    values = [y for curve in shown for _, y in curve.points] + [y for _, y in band] or [1.0]
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.1, high * 1.1
    else:
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = low - room, high + room
    x = Axis(0, max(1, rounds), LEFT, WIDTH - RIGHT)
    return Plot(title, unit, x, Axis(low, high, HEIGHT - BOTTOM, TOP, log), tuple(shown), band)


def _drawn(points: Points, log: bool) -> Points:
    return [(x, y) for x, y in points if math.isfinite(y) and abs(y) < 1e12 and (y > 0 or not log)]


def losses(story: Story) -> Plot:
    """Draw the training loss: of each site, or of many the middle one and nine tenths of them."""
    kept = sorted((number, one) for number, one in story.rounds.items() if one.losses)
    sites = sorted({site for _, one in kept for site in one.losses} | story.steps.keys())
    if len(sites) <= TOLD_APART:
        curves = [
            Curve(
                site,
                COLOURS[at],
                [(number, one.losses[site]) for number, one in kept if site in one.losses] + story.steps.get(site, []),
            )
            for at, site in enumerate(sites)
        ]
        return _plot("Training loss", "nats a token", story.spec.rounds, curves)
    spreads = [(number, one.spread) for number, one in kept]
    band = [(x, low) for x, (low, _, _) in spreads] + [(x, high) for x, (_, _, high) in reversed(spreads)]
    middle = Curve(f"median of {len(sites):,} sites", COLOURS[0], [(x, middle) for x, (_, middle, _) in spreads])
    return _plot("Training loss", "nats a token", story.spec.rounds, [middle], band=band)


def figures(story: Story) -> Plot:
    """Draw the perplexity of the plug-in over the rounds, and the other figures as levels."""
    rounds, values = story.spec.rounds, {name: perplexity(sets.values()) for name, sets in story.scores.items()}
    numbered = {int(name.partition(":")[2]): value for name, value in values.items() if _is(name, PLUG_IN)}
    if PLUG_IN in values and max(story.rounds, default=0) not in numbered:  # else it is that of one of these
        numbered[max(story.rounds, default=rounds)] = values[PLUG_IN]
    start = {0: values[BASE_ZERO_SHOT]} if numbered and BASE_ZERO_SHOT in values and not story.spec.start else {}
    curves = [
        Curve(figure.title, figure.colour, [(0, values[name]), (rounds, values[name])], level=True)
        for name, figure in FIGURES.items()
        if name in values and name != PLUG_IN
    ]
    curves.append(Curve(title(PLUG_IN), FIGURES[PLUG_IN].colour, sorted((start | numbered).items())))
    return _plot("Perplexity on held-out data", "log scale, lower is better", rounds, curves, log=True)


def _is(name: str, figure: str) -> bool:
    head, _, number = name.partition(":")
    return head == figure and number.isdecimal()


def traffic(story: Story) -> Plot:
    """Draw the megabytes that each round moved."""
    rounds = sorted(story.rounds.items())
    curves = [
        Curve("down to the sites", COLOURS[1], [(number, sum(one.down.values()) / 1e6) for number, one in rounds]),
        Curve("up from them", COLOURS[2], [(number, one.up / 1e6) for number, one in rounds if one.losses]),
    ]
    return _plot("Bytes of each round", "MB, log scale", story.spec.rounds, curves, log=True)


@dataclass(frozen=True)
class Box:
    """A run in the graph of versions; places are pixels of its upper left corner."""

    run: str
    task: str
    versions: str  # which rounds of it
    figure: str
    gone: bool  # its last version was taken back
    x: int
    y: int


@dataclass(frozen=True)
class Arrow:
    """From a version to the run that went on from it; a path of SVG, and where its name stands."""

    path: str
    name: str
    x: int
    y: int


@dataclass(frozen=True)
class Graph:
    """Which run went on from which."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    width: int
    height: int


def lineage(versions: Sequence[Version]) -> Graph:
    """Lay out the runs of versions from left to right, each right of the one that it went on from."""
    last = {version.run: version for version in versions}
    origin = {run: one.start.partition(":")[0] for run, one in last.items()}
    children: dict[str, list[str]] = {}
    for run, before in origin.items():
        children.setdefault(before if before in last else "", []).append(run)
    places = dict(_places(children))
    boxes = tuple(_box(last[run], versions, column, row) for run, (column, row) in places.items())
    arrows = tuple(_arrow(last[run].start, places[origin[run]], places[run]) for run in last if origin[run] in places)
    columns, rows = (1 + max((place[at] for place in places.values()), default=0) for at in (0, 1))
    return Graph(boxes, arrows, columns * (BOX_WIDTH + GAP_X) - GAP_X + 2, rows * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2)


def _places(children: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the column and the row of each run; the first that went on from one stands in the row of that."""
    row = -1
    waiting = [(run, 0, True) for run in reversed(children.get("", ()))]
    while waiting:
        run, column, down = waiting.pop()
        row += down
        yield run, (column, row)
        later = children.get(run, ())
        waiting += [(one, column + 1, at > 0) for at, one in reversed(list(enumerate(later)))]


def _box(last: Version, versions: Sequence[Version], column: int, row: int) -> Box:
    numbers = [one.round for one in versions if one.run == last.run]
    rounds = f"rounds {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"round {numbers[0]}"
    figure = f"plug-in {short(last.figures[PLUG_IN])}" if PLUG_IN in last.figures else ""
    x, y = _corner(column, row)
    return Box(last.run, last.task, rounds, figure, last.withdrawal is not None, x, y)


def _arrow(start: str, before: tuple[int, int], after: tuple[int, int]) -> Arrow:
    (left, upper), (right, lower) = _corner(*before), _corner(*after)
    x0, y0, x1, y1 = left + BOX_WIDTH, upper + BOX_HEIGHT // 2, right, lower + BOX_HEIGHT // 2
    bend = x0 + GAP_X // 2
    return Arrow(f"M{x0},{y0}H{bend}V{y1}H{x1 - 8}", f":{start.partition(':')[2]}", x1 - 5, y1 - 6)


def _corner(column: int, row: int) -> tuple[int, int]:
    return 1 + column * (BOX_WIDTH + GAP_X), 1 + row * (BOX_HEIGHT + GAP_Y)
