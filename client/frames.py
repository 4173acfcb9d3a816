"""A run's report as pandas frames, for whoever goes on from them in Python."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from offsite.protos.figures import FIGURES

if TYPE_CHECKING:
    from pandas import DataFrame


def figures(report: Mapping[str, Any]) -> "DataFrame":
    """Return the perplexities, a row for each held-out set and one over all, a column for each figure measured."""
    from pandas import DataFrame

    rows = {**report["sites"], "overall": report["overall"]}
    columns = [name for name in FIGURES if any(row.get(name) is not None for row in rows.values())]
    return DataFrame.from_dict(rows, orient="index", columns=columns or None).astype(float).rename_axis("set")


def rounds(report: Mapping[str, Any]) -> "DataFrame":
    """Return what each site gave in each round: loss, examples, weight in the average, bytes, memory."""
    from pandas import DataFrame

    rows = [
        {"round": one["round"], "site": site, **{name: value for name, value in told.items() if name != "losses"}}
        for one in report["rounds"]
        for site, told in one["sites"].items()
    ]
    return DataFrame(rows, columns=None if rows else ["round", "site"]).set_index(["round", "site"])


def held_out(report: Mapping[str, Any]) -> "DataFrame":
    """Return what sites told of the rows that they hold out: rows, tokens and perplexities, a row a site."""
    from pandas import DataFrame

    sites = (report.get("exam") or {"sites": {}})["sites"]
    return DataFrame.from_dict(sites, orient="index").rename_axis("site")


def steps(report: Mapping[str, Any]) -> "DataFrame":
    """Return the loss of each step that sites told, a row a step, a column a site."""
    from pandas import DataFrame

    rows = [
        {"round": one["round"], "step": step, "site": site, "loss": loss}
        for one in report["rounds"]
        for site, told in one["sites"].items()
        for step, loss in enumerate(told["losses"], start=1)
    ]
    frame = DataFrame(rows, columns=["round", "step", "site", "loss"])
    return frame.pivot(index=["round", "step"], columns="site", values="loss")


def spans(report: Mapping[str, Any]) -> "DataFrame":
    """Return what was done when and by whom, in seconds since the run's first span."""
    from pandas import DataFrame

    columns = ["who", "step", "kind", "start", "end"]
    frame = DataFrame([{name: span.get(name) for name in columns} for span in report["spans"]], columns=columns)
    begin = frame["start"].min()
    return frame.assign(start=frame["start"] - begin, end=frame["end"] - begin).sort_values("start", ignore_index=True)
