"""A run with virtual sites, from its spec to its report: the run's own supervisor, over a journal of its own."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.client import report as pages
from offsite.client.site.policy import Policy
from offsite.coordinator.home import Home
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.history import History
from offsite.coordinator.runs.legality import judge
from offsite.coordinator.runs.steps.performing import perform
from offsite.coordinator.runs.steps.results import SELECT
from offsite.coordinator.runs.supervisor import Lost, Supervisor
from offsite.coordinator.store.journal import LIVE, Journal
from offsite.deploy.simulation.clock import Clock
from offsite.deploy.simulation.data import MOST_SITES, Data, open_data
from offsite.deploy.simulation.machines import Machines, Note, admission
from offsite.deploy.simulation.orders import OWN, Setup
from offsite.deploy.simulation.origin import bring, continued, stream
from offsite.deploy.simulation.plot import draw
from offsite.deploy.simulation.pool import Pool
from offsite.deploy.simulation.rounds import RUN, Rounds, clear, moment
from offsite.deploy.simulation.world import World
from offsite.protos.documents import document, from_json, to_json, to_plain
from offsite.protos.errors import ConflictError, InputError, ResourceError, RunError
from offsite.protos.ranges import Count, Place, Seed
from offsite.protos.spec import Choice, RunSpec

IID = Choice(name="iid")
Tell = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Simulation:
    """What a simulation came to."""

    out: Path  # a folder with adapter/, perhaps merged/, report.json, report.html and clock.svg
    report: dict[str, Any]  # that of any run, and under "simulation" what only a simulation has

    @property
    def adapter(self) -> Path:
        """The folder of the outcome, as a live run publishes it: LoRA in peft's format."""
        return self.out / "adapter"


@document
class Settings:
    """What decides about the bytes of a simulation beside its run; kept, so that one that was killed goes on."""

    spec: RunSpec
    data: Place
    sites: Count
    partition: Choice
    policy: Policy
    world: World | None
    sample: Count
    seed: Seed
    train: Place
    start: Place = ""


def simulate(
    spec: RunSpec,
    *,
    data: Path,
    out: Path,
    sites: int | None = None,
    partition: Choice = IID,
    policy: Policy | None = None,
    world: World | None = None,
    sample: int = 0,
    seed: int = 0,
    workers: int | None = None,
    train: str = OWN,
    start: Path | None = None,
    tell: Tell | None = None,
    begin: Callable[[Data], None] | None = None,
    ray_address: str = "",
    ray_token: Path | None = None,
    note: Note | None = None,
) -> Simulation:
    """Do a run with virtual sites, and write its outcome into a folder.

    Killed and called again with the same arguments, it goes on after the last round that was done.

    Args:
        spec: the run, as an owner may submit it; it may name some of the sites that a folder has.
        data: a file or folder of examples, which is cut into those of the sites; without `sites` a folder with a file
            or folder for each site.
        out: the folder of the outcome.
        sites: how many.
        partition: how the data is cut: iid, dirichlet, length or key.
        policy: of every site; the default one allows any base.
        world: what sites are like on a virtual clock; None: a round takes no time.
        sample: sites that a round asks; 0: all.
        seed: of the partition, the sample and the world.
        workers: processes; None: one a core. Their number changes no byte.
        train: MODULE:FUNCTION that trains in place of a site's trainer: it is given a `Visit` and returns the adapter
            and its metrics. All that comes before and after it stays.
        start: the folder of a simulation that is over, from whose end this one goes on.
        tell: is told of (round, sites done, of how many), the round counted from zero.
        begin: is told what data the sites have.
        ray_address: HOST:PORT of the head of a Ray cluster that this machine is in: the others train, too, with all
            cores that are free there. They change no byte, whichever come and go.
        ray_token: the file with the cluster's token; None: it is in the environment.
        note: is told in a sentence of machines that come and go.

    Raises InputError, ConflictError where the folder holds another simulation, RunError where the run fails; where the
    cluster cannot be used, UnreachableError, IdentityError or MismatchError, within ten seconds.
    """
    environment = admission(ray_address, ray_token)
    if spec.sites and sites is not None:
        raise InputError(
            f"sites: the run names its sites, and {sites} others cannot be made up; leave out one of the two"
        )
    _judge(spec)
    grant = _granted(spec, start)
    policy = policy or Policy(bases=("any",), data=(str(data),))
    objective = spec.training.objective
    source = open_data(data, sites, partition, seed=seed, odd_rows=policy.odd_rows, objective=objective)
    if missing := sorted({*spec.sites} - {*source.names}):
        raise InputError(
            f"{data}: has nothing of site {missing[0]}, which the run names; there are {source.names[:20]}"
        )
    names = sorted(spec.sites) or source.names
    if not spec.min_sites <= len(names) <= MOST_SITES:
        raise InputError(f"{len(names)} sites: expected {spec.min_sites} (min_sites) to {MOST_SITES}")
    if begin:
        begin(source)
    settings = Settings(
        spec=spec,
        data=str(data.resolve()),
        sites=sites or 0,
        partition=partition,
        policy=policy,
        world=world,
        sample=sample,
        seed=seed,
        train=train,
        start=str(start.resolve()) if start else "",
    )
    home = _home(out, settings)
    journal = _begun(home, grant, settings)
    if journal.run(RUN).state in LIVE:
        journal.begin_run(RUN, names)
        setup = Setup(
            socket="",
            number=0,
            workers=1,
            spool="",
            data=settings.data,
            sites=settings.sites,
            partition=partition,
            seed=seed,
            policy=policy,
            objective=objective,
            train=train,
        )
        del source  # the workers have it
        pool = Pool(setup, workers or os.cpu_count() or 1, home.root / "spool")
        others = Machines(ray_address, environment, pool, note or _silent) if ray_address else nullcontext()
        with pool, others:
            rounds = Rounds(
                *(home, journal, grant, pool, Clock(world, spec, seed)),
                sample=sample,
                seed=seed,
                tell=tell or _silent,
            )
            try:
                Supervisor(home, RUN, perform=lambda *step: perform(home.node, *step[:3]), train=rounds).run()
            except Lost as lost:
                raise ResourceError(f"{lost}; started again, the simulation goes on") from lost
    row = journal.run(RUN)
    if row.state != "completed":
        raise RunError(f"the simulation {row.state}: {row.error}")
    report = json.loads(row.report) | {"simulation": _summary(History(journal, RUN), settings)}
    for artifact in journal.artifacts(RUN):
        file = out / artifact.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(home.node.blobs().path(artifact.digest).read_bytes())
    (out / "report.json").write_text(json.dumps(report, allow_nan=False))
    pages.write(report, out / "report.html", stream=stream(journal))
    draw(report["simulation"]["rounds"], out / "clock.svg")
    journal.close()
    clear(home)
    return Simulation(out, report)


def _silent(*_: object) -> None:
    """Tell nobody."""


def _judge(spec: RunSpec) -> None:
    """Raise InputError for what only a live run can do."""
    if spec.join:
        raise InputError("join: nobody comes after the start of a simulation; leave it out")
    if spec.contributions:
        raise InputError("contributions: a simulation keeps no updates to fold again; measure them in a run")
    if spec.staleness:
        raise InputError("staleness: a simulation keeps no update beyond its round; leave it out, and late ones drop")


def _granted(spec: RunSpec, start: Path | None) -> Grant:
    """Judge a run, and what it goes on from; raises InputError."""
    if spec.start:
        raise InputError(
            f"start: run {spec.start} is a coordinator's, and a simulation goes on from another one; leave it out of "
            "the run, and give that one's folder (--start DIR)"
        )
    if start:
        return continued(spec, start)
    judge(spec)
    return Grant(**vars(spec))


def _begun(home: Home, grant: Grant, settings: Settings) -> Journal:
    """Return the journal with the run in it, and with those that it goes on from."""
    journal = home.journal()
    if settings.start:
        bring(home, journal, Path(settings.start))
    spec = to_json(settings.spec)
    journal.add_run(RUN, token=RUN, owner="simulation", spec=spec, granted=to_plain(grant))
    return journal


def _home(out: Path, settings: Settings) -> Home:
    """Return the folder that the simulation works in; raises ConflictError where it is another's."""
    root = out.resolve() / "home"  # a URL is made of it
    home = Home(root, root)
    home.prepare()
    kept = home.root / "settings.json"
    if not kept.exists():
        kept.write_bytes(to_json(settings))
    elif from_json(Settings, kept.read_bytes(), where=str(kept)) != settings:
        raise ConflictError(f"{out}: holds another simulation; name another folder, or remove this one")
    return home


def _summary(history: History, settings: Settings) -> dict[str, Any]:
    rounds = [to_plain(history[moment(number + 1)]) for number in range(history.rounds(settings.spec.rounds))]
    return {
        "sites": len(history[SELECT].names),
        "partition": to_plain(settings.partition),
        "sample": settings.sample,
        "seed": settings.seed,
        "world": to_plain(settings.world) if settings.world else None,
        "rounds": rounds,
    }
