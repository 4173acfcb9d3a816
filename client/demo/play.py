"""The main job end to end on one machine: sites, coordinator and researcher as separate processes over mutual TLS.

Everything goes the way it would between machines. What only a demonstration can do is said where it is done: it
hands each site its data, and it computes, at the sites' side, what takes the base or all their rows.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from offsite.client.answers import Event
from offsite.client.demo import policy
from offsite.client.demo.data import SiteData, divide, prepare, split
from offsite.client.demo.outcome import join
from offsite.client.demo.pooled import Pooled, PooledJob, Rows, What
from offsite.client.demo.processes import Processes
from offsite.client.progress import follow
from offsite.client.session import Run, connect
from offsite.emulator import zoo
from offsite.protos.documents import from_json, parse, to_json
from offsite.protos.errors import ConflictError, InputError, OffsiteError, RunError, UnreachableError, from_system
from offsite.protos.spec import Choice, LocalTraining, Manifest, RunSpec, TrainingSpec

SHARED = 2  # sites that have a part of a task each
MARK = ".offsite-demo"  # says that a folder is ours to empty
POOLED: dict[What, str] = {"bound": "the base itself", "attack": "all of the emulator, unfrozen"}
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin while they wait starve the other processes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a demo is run with."""

    out: Path
    model: str = "smollm2-135m-instruct"
    sites: dict[str, Path] = field(default_factory=dict)  # empty: the built-in ones
    public: Path | None = None
    rounds: int = 2
    steps: int = 6
    keep: int | None = None  # four fifths
    method: Choice = Choice(name="lora", settings={"rank": 8})
    learning_rate: float | None = None  # what suits the model
    batch_size: int = 4
    max_length: int = 96
    examples: int = 72
    held_out: int = 16
    exam: bool = False  # whether sites hand what they hold out over to the owner
    precision: Literal["fp32", "bf16"] | None = None  # None: what this machine computes in fastest
    engine: str = "deepspeed"
    zero_stage: int = 2
    seed: int = 0
    merge: bool = False
    memory: Choice | None = None  # of a stream of tasks, each of which is a site's data; None: one run of all sites

    @property
    def hands_over(self) -> bool:
        """Whether the owner is to have examples of the sites: what is forgotten of a stream of tasks is its to tell."""
        return self.exam or self.memory is not None

    @property
    def rows(self) -> int:
        """Training examples of a built-in site; of a stream, of each that has a part of a task."""
        return self.examples if self.memory is None else self.examples // SHARED


class Demo:
    """One demonstration."""

    def __init__(self, settings: Settings, console: Console, *, format: str) -> None:
        self._settings, self._console, self._format = settings, console, format
        self._out = settings.out.resolve()
        self._work = self._out / "work"
        self._texts = self._work / "owner"  # what the owner has: exams and public text
        self._spans: list[dict[str, Any]] = []

    def play(self) -> dict[str, Any]:
        """Do it all and return the report; no process is left, however this ends."""
        started = time.time()
        self._claim()
        model, sites, public = self._materials()
        with Processes(self._out / "logs") as processes:
            address = self._start(processes, model, sites)
            with connect(address, identity=self._work / "pki" / "researcher") as session:
                run = session.submit(self._spec(sites, public))
                self._follow(run, processes)
                run.result(self._out)
            for what in POOLED:
                self._pooled(processes, run, model, sites, what)
        self._return_exams()
        return self._report(run, started)

    def _follow(self, run: Run, processes: Processes) -> None:
        """Tell of a run until it is completed; raises RunError if it is not."""
        training = run.spec.training
        self._say(f"run {run.id} submitted: {run.spec.rounds} rounds of {training.steps} steps, {training.precision}")
        with contextlib.closing(_guarded(run, processes)) as events:
            follow(events, run.spec, console=self._console, format=self._format)
        if run.state != "completed":
            raise RunError(f"the run {run.state}: {run.error} (logs: {self._out / 'logs'})")

    def _claim(self) -> None:
        """Make the output folder, or empty one that an earlier demo made; leave any other alone."""
        if self._out.exists() and any(self._out.iterdir()) and not (self._out / MARK).exists():
            raise ConflictError(f"{self._out}: not empty, and not made by a demo; name another folder with --out")
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / MARK).touch()
        for name in ("work", "logs", "adapter", "experts", "merged"):
            shutil.rmtree(self._out / name, ignore_errors=True)
        for name in ("report.json", "report.html", "forgetting.json", "forgetting.svg"):
            (self._out / name).unlink(missing_ok=True)
        self._work.mkdir()

    def _materials(self) -> tuple[str, list[SiteData], Path]:
        """Fetch or find the model, and lay out each site's private data and the owner's exam."""
        settings, cache = self._settings, zoo.cache_folder()
        self._say(f"model {settings.model} (cache: {cache})")
        layout: dict[str, Any] = {"held_out": settings.held_out, "seed": settings.seed}
        whose = layout | {"exam": settings.hands_over}
        with self._span("download"):
            try:
                source = zoo.locate(settings.model, cache=cache)
            except ValueError as error:
                raise InputError(str(error)) from None
            needs_ours = not settings.sites or settings.public is None
            ours = prepare(self._work, cache=cache, examples=settings.examples, **whose) if needs_ours else []
        sites = [split(name, file, self._work, **whose) for name, file in settings.sites.items()] or ours
        public = self._texts / "public.jsonl"
        if settings.public is not None and not settings.hands_over:
            divide(settings.public, self._work, **layout)
        elif settings.public is not None:
            public = self._texts / f"public{''.join(settings.public.suffixes)}"
            _copy(settings.public, public)
        for site in sites:
            held = f"{site.apart} held out" if site.apart else "exam handed over"
            self._say(f"site {site.name}: {site.source}; {held}")
        return str(source), sites, public

    def _start(self, processes: Processes, model: str, sites: list[SiteData]) -> str:
        """Issue certificates, start the coordinator and the sites, wait until all are there."""
        from offsite.protos.security.pki import Authority

        authority = Authority.create(self._work / "pki")
        kits = {site.name: authority.issue("site", site.name) for site in sites}
        authority.issue("researcher", "researcher")
        owner = authority.issue("coordinator", "coordinator")
        rules = policy.write_owners(self._work / "owner.toml", model=model, texts=self._texts, settings=self._settings)
        home = ["--home", str(self._work / "home"), "--identity", str(owner), "--policy", str(rules)]
        listen = ["--listen", "127.0.0.1:0", "--format", "json"]
        processes.start("coordinator", "coordinator", "up", *home, *listen, environment=PASSIVE)
        address = str(processes.wait_for("coordinator", "ready")["address"])
        for site in sites:
            path = self._work / "sites" / site.name / "policy.toml"
            rules = policy.write(path, site=site, settings=self._settings)
            processes.start(
                site.name,
                *("site", "join", address, "--identity", str(kits[site.name]), "--policy", str(rules)),
                *("--data", str(site.train), "--work", str(self._work / "sites" / site.name / "work")),
                *("--engine", self._settings.engine, "--zero-stage", str(self._settings.zero_stage)),
                *("--format", "json"),
                environment=PASSIVE | {"OMP_NUM_THREADS": "1"},
            )
        for site in sites:
            processes.wait_for(site.name, "enrolled")
        self._say(f"coordinator on {address}, {len(sites)} sites enrolled over mutual TLS")
        return address

    def _spec(self, sites: list[SiteData], public: Path) -> RunSpec:
        settings = self._settings
        return RunSpec(
            name="offsite demo",
            model=policy.MODEL,
            builders=(Choice(name="crash", settings={"keep": settings.keep, "sharing": "auto"}),),
            method=settings.method,
            training=TrainingSpec(
                steps=settings.steps,
                batch_size=settings.batch_size,
                seed=settings.seed,
                learning_rate=settings.learning_rate,
                max_length=settings.max_length,
                precision=self._precision(),
            ),
            rounds=settings.rounds,
            sites=tuple(site.name for site in sites),
            min_sites=len(sites),
            public=self._named(public),
            evaluation={name: self._named(exam) for name, exam in self._exams(sites).items()},
            merge=settings.merge,
        )

    def _exams(self, sites: list[SiteData]) -> dict[str, Path]:
        """Return what the owner measures on: what sites have handed over, or what it has itself."""
        handed, own = {site.name: site.held_out for site in sites if site.held_out}, self._texts / "exam.jsonl"
        return handed or ({"owner": own} if own.exists() else {})

    def _named(self, text: Path) -> str:
        """Name a text as the owner's policy lets a researcher name it."""
        return text.relative_to(self._texts).as_posix()

    def _precision(self) -> Literal["fp32", "bf16"]:
        """Return what was asked for, else what this machine computes in fastest."""
        if self._settings.precision:
            return self._settings.precision
        import torch

        from offsite.emulator.precision import fastest, race

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = fastest(device)
        self._say(f"computing in {precision}" + (f": {race()}" if device.type == "cpu" else ""))
        return precision

    def _pooled(self, processes: Processes, run: Run, model: str, sites: list[SiteData], what: What) -> None:
        """Measure what takes all data in one place, in a process of its own, and keep what it gave."""
        spec = run.spec
        self._say(f"the {what}: training {POOLED[what]}, with all data pooled, which only a demo can do")
        document = next((self._work / "sites" / sites[0].name / "work" / "bundles").glob("*.json"))
        job = PooledJob(
            what=what,
            spec=replace(spec, model=model),
            training=parse(LocalTraining, run.report["training"], where="report: training"),
            manifest=from_json(Manifest, document.read_bytes(), where=str(document)),
            bundle=str(document.with_suffix("")),
            adapter=str(self._out / "adapter"),
            rows={site.name: self._rows(site) for site in sites},
            steps=spec.rounds * spec.training.steps * len(sites),
        )
        paths = (self._work / f"{what}-job.json", self._work / f"{what}.json")
        paths[0].write_bytes(to_json(job))
        processes.start(what, *map(str, paths), module="offsite.client.demo.pooled", environment=PASSIVE)
        with self._console.status("loading the model") as status:
            for line in processes.follow(what):
                if line["event"] == "done":
                    return
                if line["step"] == 1:
                    begun = time.time()
                step, steps = line["step"], line["steps"]
                left = (time.time() - begun) / max(1, step - 1) * (steps - step)
                message = f"the {what}: step {step} of {steps}, loss {line['loss']:.3f}, about {left:.0f} s left"
                status.update(Text(message))
                if self._format == "json":
                    print(json.dumps({**line, "event": what}), flush=True)
                elif not self._console.is_terminal and step % 16 == 0:
                    self._say(message)

    def _return_exams(self) -> None:
        """Remove what sites have handed over."""
        shutil.rmtree(self._texts / "held-out", ignore_errors=True)

    def _rows(self, site: SiteData) -> Rows:
        """Say where a site's rows are, which only a demo can: it plays the site, too."""
        secret = "" if site.held_out else str(self._work / "sites" / site.name / "work" / "secret")
        return Rows(train=str(site.train), apart=site.apart, secret=secret, exam=str(site.held_out or ""))

    def _report(self, run: Run, started: float) -> dict[str, Any]:
        """Join the coordinator's report, the bound and the demo's own times; write it as JSON and HTML."""
        from offsite.client.report import write

        report = run.report
        report["spans"] += [{"who": "demo", "step": "materials", **span} for span in self._spans]
        files = {what: self._work / f"{what}.json" for what in POOLED}
        measured = {what: from_json(Pooled, file.read_bytes(), where=str(file)) for what, file in files.items()}
        join(report, measured, started=started)
        (self._out / "report.json").write_text(json.dumps(report, indent=2))
        write(report, self._out / "report.html")
        return report

    @contextlib.contextmanager
    def _span(self, kind: str) -> Iterator[None]:
        start = time.time()
        yield
        self._spans.append({"kind": kind, "start": start, "end": time.time()})

    def _say(self, line: str) -> None:
        if self._format == "json":
            print(json.dumps({"event": "demo", "message": line, "at": time.time()}), flush=True)
        else:
            self._console.print(Text.assemble((time.strftime("%H:%M:%S"), "dim"), "  ", line))  # a path is not markup


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder of text; raises InputError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        raise from_system(error) from None


def _guarded(run: Run, processes: Processes) -> Generator[Event, None, None]:
    """Yield the run's events; if a process of the demo dies, cancel the run and raise that process's last words."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            try:
                processes.check()
            except OffsiteError:
                with contextlib.suppress(OffsiteError):
                    run.cancel()
                return

    watchdog = threading.Thread(target=look, daemon=True)
    watchdog.start()
    try:
        yield from run.watch()
    except UnreachableError:
        processes.check()
        raise
    finally:
        over.set()
        watchdog.join()
    processes.check()
