"""How long a federation takes from one round to the next, beside the training itself.

    python tests/bench/rounds.py [--executor threads] [--engine plain] [--sites 4] [--rounds 6]

It starts a coordinator and site agents, real processes with certificates, on a tiny model, and prints for every round
how long it took from the last upload of the round before until its updates were averaged, until all sites had heard of
their new task, and until the first and the last site had done a step. The first round is not counted: it has nothing
before it. `loading` is what a site does between hearing of its task and its first step, of all that it does of a task.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.integration.conftest import Federation, write_material

from offsite.client import Event, TrainingSpec

NAMES = ("averaged", "told", "first step", "all stepping")


def gaps(events: list[Event], said: list[dict[str, list[dict[str, float]]]]) -> list[tuple[float, ...]]:
    """Return for each round but the first the seconds from the last upload before it to each moment of NAMES."""
    rounds = max(event.round for event in events)
    found = []
    for number in range(2, rounds + 1):
        uploaded = max(event.at for event in events if event.kind == "update" and event.round == number - 1)
        averaged = next(event.at for event in events if event.kind == "round" and event.round == number - 1)
        told = max(at(site["task"], number) for site in said)
        steps = [at(site["step"], number) for site in said]
        found.append(tuple(moment - uploaded for moment in (averaged, told, min(steps), max(steps))))
    return found


def at(lines: list[dict[str, float]], number: int) -> float:
    """Return when a site first said something of a round."""
    return next(line["at"] for line in lines if line["round"] == number)


def loading(said: list[dict[str, list[dict[str, float]]]], number: int) -> float:
    """Return the share of a round that sites spend before their first step."""
    spent = [(at(site["task"], number), at(site["step"], number), at(site["uploaded"], number)) for site in said]
    return sum(step - task for task, step, _ in spent) / sum(end - task for task, _, end in spent)


def main() -> None:
    """Run one run of several rounds and print where the time between them went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", choices=["threads", "ray"], default="threads")
    parser.add_argument("--engine", choices=["plain", "deepspeed"], default="plain")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    asked = parser.parse_args()
    names = [f"site-{number}" for number in range(1, asked.sites + 1)]
    with tempfile.TemporaryDirectory() as scratch:
        material = write_material(Path(scratch) / "material")
        federation = Federation(Path(scratch), material)
        try:
            federation.coordinate(executor=asked.executor)
            for name in names:
                federation.join(name, data=material / "hospital.jsonl", engine=asked.engine)
            training = TrainingSpec(steps=4, learning_rate=0.01, max_length=32, seed=3)
            with federation.connect() as session:
                run = session.submit(federation.spec(rounds=asked.rounds, training=training, sites=tuple(names)))
                events = list(run.watch())
            if run.state != "completed":
                raise SystemExit(f"the run {run.state}: {run.error}")
            kinds = ("task", "step", "uploaded")
            said = [{kind: federation.events(name, kind) for kind in kinds} for name in names]
        finally:
            federation.stop()
    print(f"{asked.sites} sites, {asked.engine}, steps on {asked.executor}; seconds after the last upload")
    print("round  " + "  ".join(f"{name:>12}" for name in NAMES) + "       loading")
    rows = gaps(events, said)
    for number, row in enumerate(rows, start=2):
        print(f"{number:5}  " + "  ".join(f"{moment:12.2f}" for moment in row) + f"  {loading(said, number):12.0%}")
    middle = [median(column) for column in zip(*rows, strict=True)]
    share = median(loading(said, number) for number in range(2, asked.rounds + 1))
    print("median " + "  ".join(f"{moment:12.2f}" for moment in middle) + f"  {share:12.0%}")


if __name__ == "__main__":
    main()
