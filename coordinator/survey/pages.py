"""Both tables as pages in Markdown."""

from collections.abc import Mapping
from dataclasses import asdict

import jinja2

from offsite.coordinator.survey.matrix import Matrix
from offsite.coordinator.survey.rows import Row, approximations, emulators

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("offsite.coordinator.survey", "."),
    autoescape=False,  # Markdown is no HTML
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def methods(rows: list[Row], refused: Mapping[str, str]) -> str:
    """Return the page of the methods, and of the names that are none, each with its reason."""
    return _ENVIRONMENT.get_template("methods.md.j2").render(
        rows=rows, refused=refused, emulators=emulators, approximations=approximations
    )


def legality(matrix: Matrix) -> str:
    """Return the page of the pairs."""
    return _ENVIRONMENT.get_template("legality.md.j2").render(**asdict(matrix))
