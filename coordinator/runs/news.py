"""The events that tell what a step gave."""

from offsite.coordinator.aggregation.lateness import discount
from offsite.coordinator.runs.steps.results import Built, Folded
from offsite.protos.events import EmulatorBuilt, Event, RoundDone, SiteState


def built(result: Built) -> list[Event]:
    """Tell what sites train on."""
    about = result.bundle
    return [
        EmulatorBuilt(
            layers=about.layers,
            bytes=about.bytes,
            disclosed=about.disclosed,
            learning_rate=result.learning_rate,
            computed=result.computed,
        )
    ]


def folded(number: int, result: Folded) -> list[Event]:
    """Tell of the end of a round, counted from one: who was left out, whose late updates are in it."""
    left_out = [
        SiteState(round=number, site=site, state="left out", message=why) for site, why in result.left_out.items()
    ]
    late = [
        SiteState(round=number, site=site, state="folded", message=_late(number - part.age, part.age))
        for site, part in result.late.items()
    ]
    return [*left_out, *late, RoundDone(round=number, sites=len(result.sites), figures=result.version.figures)]


def _late(number: int, age: int) -> str:
    return f"its late update, of round {number}, is in this one at {discount(age):.0%} of its weight"
