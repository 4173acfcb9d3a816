import io
from typing import Any

from rich.console import Console

from offsite.client.figures import FIGURES, table


def test_a_report_of_large_figures_and_a_long_name_is_whole_in_80_columns() -> None:
    row = dict.fromkeys(FIGURES, 31415.9)
    report: dict[str, Any] = {
        "sites": {"helpdesk": row},
        "overall": row | {"attack": None},  # as where nothing was attacked
        "tokens": {"helpdesk": 12345},
        "warnings": ["the emulator is too small"],
        "protection": {"label": "not protected", "reason": "no threshold was stated"},
        "bytes": {"down": 2e6, "up": 1e6},
        "seconds": {"total": 10, "training": 6, "evaluation": 2, "loading": 1, "download": 0, "overhead": 1},
    }
    told = io.StringIO()
    Console(file=told, width=80).print(table(report))
    text = told.getvalue()
    assert "…" not in text and text.count("31,416") == 2 * len(FIGURES) - 1
    assert all(word in text for head in FIGURES.values() for word in head.split("\n"))
    assert "warning: the emulator is too small" in text and "not protected: no threshold was stated" in text
    assert "2.0 MB down" in text and "overhead 1 = 10%" in text
