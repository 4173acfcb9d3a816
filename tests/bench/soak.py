"""Whether anything grows while a federation does one run after another: an hour of it, by default.

    python tests/bench/soak.py [--minutes 60] [--executor ray] [--out soak.csv]

It starts a coordinator and two site agents, real processes with certificates, on a tiny model, and submits one run of
two rounds after the other. Every ten runs `offsite coordinator gc` keeps the published files of the five newest runs.
After each run a line goes to the CSV file: of the coordinator with all that descends from it, and of the sites, memory
that is theirs alone (USS), open files, threads and processes; and on disk the journal, all of the coordinator's home,
Ray's logs and the sites' working folders. At the end it prints a JSON line: of each the median of the first and of the
last quarter of the lines after the first ten, and the growth between them per 100 runs.

The journal keeps rows, events, reports and lineage of every run for ever: its growth per run is what that costs.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.integration.conftest import Federation, write_material

SITES = ("hospital", "bank")
WARM, GC_EVERY, KEPT = 10, 10, 5  # runs


def held(processes: list[psutil.Process]) -> tuple[float, int, int, int]:
    """Return the MB, open files, threads and number of processes."""
    mb, files, threads, count = 0.0, 0, 0, 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # a step's or a task's, which has just ended
            about = process.memory_full_info().uss / 1e6, process.num_fds(), process.num_threads()
            mb, files, threads, count = mb + about[0], files + about[1], threads + about[2], count + 1
    return mb, files, threads, count


def disk_mb(folder: Path) -> float:
    """Return what the files under a folder hold."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += path.lstat().st_size
    return size / 1e6


def sample(federation: Federation, ray: Path) -> dict[str, float]:
    """Look at all that may grow."""
    coordinator = held(federation.tree("coordinator"))
    sites = held([process for name in SITES for process in federation.tree(name)])
    kinds = ("mb", "files", "threads", "processes")
    home = federation.folder / "home"
    return {
        **{f"coordinator_{kind}": value for kind, value in zip(kinds, coordinator, strict=True)},
        **{f"sites_{kind}": value for kind, value in zip(kinds, sites, strict=True)},
        "journal_mb": sum(path.stat().st_size for path in home.glob("journal.db*")) / 1e6,
        "home_mb": disk_mb(home),
        "work_mb": disk_mb(federation.folder / "work"),
        "ray_mb": disk_mb(ray),
    }


def collect(federation: Federation) -> None:
    """Remove what no run needs."""
    home = ["--home", str(federation.folder / "home")]
    command = [sys.executable, "-m", "offsite.client", "coordinator", "gc", *home]
    subprocess.run([*command, "--keep-runs", str(KEPT), "--working-days", "0"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Do runs for as long as asked for, and print what grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--executor", choices=["threads", "ray"], default="ray")
    parser.add_argument("--out", type=Path, default=Path("soak.csv"))
    asked = parser.parse_args()
    until, rows = time.monotonic() + 60 * asked.minutes, list[dict[str, float]]()
    with tempfile.TemporaryDirectory() as scratch, asked.out.open("w", buffering=1) as file:
        federation = Federation(Path(scratch), write_material(Path(scratch) / "material"))
        try:
            federation.coordinate(executor=asked.executor)
            ray = Path("/tmp/ray/session_latest" if asked.executor == "ray" else scratch + "/none").resolve()
            for name in SITES:
                federation.join(name)
            with federation.connect() as session:
                while time.monotonic() < until:
                    run = session.submit(federation.spec(rounds=2, sites=SITES)).wait()
                    if run.state != "completed":
                        raise SystemExit(f"the run {run.state}: {run.error}")
                    if len(rows) % GC_EVERY == 0:
                        collect(federation)
                    rows.append({"run": len(rows) + 1, **sample(federation, ray)})
                    lines = csv.DictWriter(file, list(rows[0]))
                    if len(rows) == 1:
                        lines.writeheader()
                    lines.writerow({name: round(value, 3) for name, value in rows[-1].items()})
        finally:
            federation.stop()
    print(json.dumps({"runs": len(rows), "minutes": asked.minutes, **growth(rows[WARM:])}))


def growth(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return of each column the medians of its first and last quarter, and the growth per 100 runs."""
    quarter = max(1, len(rows) // 4)
    result = {}
    for name in rows[0].keys() - {"run"} if rows else ():
        first, last = (median(row[name] for row in part) for part in (rows[:quarter], rows[-quarter:]))
        runs = max(1, len(rows) - quarter)
        result[name] = {
            "first": round(first, 2),
            "last": round(last, 2),
            "per_100": round(100 * (last - first) / runs, 3),
        }
    return dict(sorted(result.items()))


if __name__ == "__main__":
    main()
