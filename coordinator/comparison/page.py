"""A comparison as one HTML file that needs nothing else."""

from pathlib import Path

import jinja2

from offsite.coordinator.comparison.plots import draw
from offsite.coordinator.comparison.rows import ATTACKS, FIVE, Answered, Comparison
from offsite.coordinator.comparison.table import next_step, share, short, verdict
from offsite.protos.figures import title


def write(comparison: Comparison, path: Path) -> None:
    """Write a comparison as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("offsite.coordinator.comparison", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "share": share, "answered": _answered}
    page = environment.get_template("page.html.j2").render(
        comparison=comparison,
        plots=draw(comparison),
        verdict=verdict(comparison),
        next_step=next_step(comparison),
        heads={name: title(name) for name in FIVE},
        attacks=ATTACKS,
    )
    path.write_text(page, encoding="utf-8")


def _answered(one: Answered) -> str:
    return f"{one.accuracy:.1%} \u00b1 {one.stderr:.1%}"
