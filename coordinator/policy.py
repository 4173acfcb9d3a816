"""The owner's own policy: what researchers may ask of the owner's models and files. Nothing in a run can widen it.

People of role owner are bound by none of it. It is read at `coordinator up`: a change of the file holds from the next
start on. What a run may ask for is judged once, when it is submitted; what it may disclose is judged when its emulator
is built, and who may fetch a merged model when it is fetched, both by the policy of that moment.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from re import fullmatch
from typing import Annotated

from pydantic import Field

from offsite.coordinator.runs.grant import Grant
from offsite.emulator.catalogue import BUILDERS, FIRST, METHODS
from offsite.protos.documents import document, from_toml, nearest, parse, to_plain
from offsite.protos.errors import InputError, NotFoundError, RefusedError
from offsite.protos.ranges import AboveZero, Count, Flag, Name, Place, Positive, Share, Word
from offsite.protos.recipes import render
from offsite.protos.security.certificates import Role
from offsite.protos.spec import Ancestor, Checks, Choice, Exams, RunSpec

MIB = 1 << 20
Words = Annotated[tuple[Word, ...], Field(max_length=256)]


@document
class OwnerPolicy:
    """What researchers may do; a TOML file with these keys. What is left out is the safe value."""

    models: dict[Name, Place] = Field(default_factory=dict)  # name -> a folder, a hub id or a name from the zoo
    data: tuple[Place, ...] = ()  # folders whose files runs may name, by their path inside
    builders: Words = ("additive", "crash", "distilled", "loram", "quantised", "sketch", "uniform")
    methods: Words = (
        "amt",
        "apet",
        "bi-lora",
        "bottleneck",
        "c3a",
        "compacter",
        "dora",
        "fourierft",
        "gralora",
        "grids",
        "halves",
        "hydra",
        "hira",
        "hra",
        "ia3",
        "invertible",
        "loha",
        "lokr",
        "loldu",
        "lora",
        "lt-sft",
        "mhr",
        "miss",
        "mos",
        "mosa",
        "oft",
        "paca",
        "peanut",
        "pvera",
        "randlora",
        "road",
        "s2ft",
        "sara",
        "shira",
        "soka",
        "spiel",
        "spt",
        "ssf",
        "vera",
        "waveft",
    )  # `blocks` publishes layers of the base, trained a little, and `fisher`, `moments`, `prototype` and `signature`
    # what the sites' activations, gradients or words are like. Of these here some disclose parts or figures of the
    # base's weights, and are for those of `merged` alone
    max_disclosed: Share = 0.9  # of a base's parameters, verbatim, by all emulators of it that were ever built
    max_disclosed_lossy: Share = 0.9  # the same, with what is stored in few bits counted in full
    merged: tuple[Name, ...] = ()  # researchers who may have the base's weights: merged, or in what adapters disclose
    gate: Checks = ()  # what must hold of every run's outcome, beside what the run asks for itself
    probes: Exams = Field(default_factory=dict)  # name -> a text that checks of this gate read, relative to this file
    continued: Flag = True  # whether runs may go on from a version of another one of theirs
    max_rounds: Positive = 20  # of a run, and of those that it goes on from
    max_steps: Positive = 1000  # optimiser steps of one round at one site
    max_tuning_steps: Positive = 10_000  # of a builder, realignment, an attack, and the base itself
    max_batch_size: Positive = 64
    max_length: Positive = 4096
    max_rank: Positive = 256  # and width, of what is beside a map
    max_sites: Positive = 100
    max_live_runs: Positive = 4  # of one researcher
    max_priority: Count = 0  # of a run's tasks: sites do those of the highest first
    max_adapter_mib: AboveZero = 64.0
    max_bundle_mib: AboveZero = 16384.0

    def __post_init__(self) -> None:
        """Refuse a name of a builder or a method that there is none of."""
        for field, known in (("builders", BUILDERS), ("methods", METHODS)):
            for name in getattr(self, field):
                if name not in known:
                    raise ValueError(f"{field}: there is no {known.kind} {name!r}; {nearest(name, list(known))}")

    @classmethod
    def load(cls, path: Path) -> "OwnerPolicy":
        """Read a policy file; folders are relative to it. Raises InputError naming the file and the field."""
        policy = from_toml(cls, path)
        folders = [_folder(path, place) for place in policy.data]
        for place, folder in zip(policy.data, folders, strict=True):
            if not folder.is_dir():
                raise InputError(f"{path}: data: {place} is not a folder")
        models = {name: _model(path, name, place) for name, place in policy.models.items()}
        probes = {name: str(_folder(path, place)) for name, place in policy.probes.items()}
        return replace(policy, models=models, data=tuple(map(str, folders)), probes=probes)

    def grant(self, spec: RunSpec, *, role: Role, person: str, live: int, continues: Ancestor | None = None) -> Grant:
        """Let a run in: return it with the places its names stand for.

        Args:
            spec: the run as it was submitted.
            role: of who submitted it; an owner may name any place, and is bound by nothing.
            person: who submitted it.
            live: how many runs of theirs are not over.
            continues: the version that its start stands for.

        Raises RefusedError naming the bound it goes beyond.
        """
        bound = role != "owner"
        if bound:
            self._check(spec, person=person, live=live, continues=continues)
        model = self.models.get(spec.model, spec.model)
        texts = {name: self._file(name, bound=bound) for name in _texts(spec)}
        placed = to_plain(spec) | {
            "model": model,
            "public": texts.get(spec.public, ""),
            "calibration": texts.get(spec.calibration, ""),
            "attack_text": texts.get(spec.attack_text, ""),
            "evaluation": {exam: texts[name] for exam, name in spec.evaluation.items()},
            "probes": {probe: texts[name] for probe, name in spec.probes.items()} | (self.probes if bound else {}),
            "gate": [to_plain(one) for one in (*spec.gate, *(self.gate if bound else ()))],
        }
        names = {place: name for name, place in {spec.model: model, **texts}.items() if place != name}
        granted = {
            "continues": continues,
            "role": "researcher" if bound else "owner",
            "names": names,
            "folders": self.data if bound else (),
            "whole": not bound or FIRST in self.builders,
            "base_name": spec.model if spec.model in self.models else "",
        }
        return parse(Grant, placed | granted, where="run spec")

    def _check(self, spec: RunSpec, *, person: str, live: int, continues: Ancestor | None) -> None:
        if spec.model not in self.models:
            known = ", ".join(self.models) or "none"
            raise _refused("models", f"a run's model is one of the policy's names ({known})")
        for builder in spec.builders:
            if builder.name not in self.builders:
                raise _refused("builders", f"{builder.name} is not among {', '.join(self.builders)}")
        if spec.method.name not in self.methods:
            raise _refused("methods", f"method {spec.method.name} is not among {', '.join(self.methods)}")
        if spec.merge and person not in self.merged:
            raise _refused("merged", f"a merged model holds all of the base, and {person} may not have one")
        if person not in self.merged and (disclosure := _disclosure(spec.method)):
            raise _refused(
                "merged",
                f"an adapter of {render([spec.method])} has {disclosure} of the base's weights in it, which {person} "
                "may not have",
            )
        if continues and not self.continued:
            raise _refused("continued", "a run begins from what changes nothing, not from a version of another one")
        training = spec.training
        tuning = [_largest(builder, "steps", "iterations") for builder in spec.builders]
        batches = [_largest(builder, "batch_size") for builder in spec.builders]
        for bound, value in {
            "max_rounds": spec.rounds + (continues.rounds if continues else 0),
            "max_steps": training.steps,
            "max_tuning_steps": max(spec.realign_steps, spec.attack_steps * spec.attack_longest, *tuning),
            "max_batch_size": max(training.batch_size, *batches),
            "max_length": training.max_length,
            "max_rank": _largest(spec.method, "rank", "r", "width", "bottleneck", "rank_pattern"),
            "max_sites": max(len(spec.sites), spec.min_sites),
            "max_live_runs": live + 1,
            "max_priority": spec.priority,
        }.items():
            if value > getattr(self, bound):
                raise _refused(bound, f"{value} is more than {getattr(self, bound)}")

    def _file(self, name: str, *, bound: bool) -> str:
        """Return the path that a name of a text stands for, its links followed."""
        inside = PurePosixPath(name)
        if not inside.is_absolute() and ".." not in inside.parts:
            for folder in map(Path, self.data):
                if (folder / inside).exists() or (folder / inside).is_symlink():
                    target = (folder / inside).resolve()
                    if target.is_relative_to(folder.resolve()):
                        return str(target)
                    if bound:
                        raise _refused("data", f"{name} is a link that leads out of its folder")
        elif bound:
            raise _refused("data", f"{name} must be the path of a file inside the policy's folders, without '..'")
        if bound:
            raise NotFoundError(f"{name}: no such file in the folders of the owner's policy")
        return name

    def check_built(self, *, sites: int, adapter: int, bundle: int) -> None:
        """Raise RefusedError for more sites than allowed, or a larger adapter or emulator, both in bytes."""
        if sites > self.max_sites:
            raise _refused("max_sites", f"{sites} sites are more than {self.max_sites}")
        if adapter > self.max_adapter_mib * MIB:
            raise _refused("max_adapter_mib", f"{adapter / MIB:.1f} MiB are more than {self.max_adapter_mib:g}")
        if bundle > self.max_bundle_mib * MIB:
            raise _refused("max_bundle_mib", f"{bundle / MIB:.0f} MiB are more than {self.max_bundle_mib:g}")

    def may_fetch(self, name: str, *, role: Role, person: str) -> bool:
        """Tell whether one who may see a run may have a published file of it."""
        if role == "auditor":
            return False
        return role == "owner" or not name.startswith("merged/") or person in self.merged

    def describe(self) -> list[tuple[str, str, str]]:
        """Return (bound, value, why) rows for people."""
        models = "\n".join(f"{name}: {place}" if name != place else name for name, place in self.models.items())
        share = "of a base's parameters, by all its emulators together"
        return [
            ("models", models or "none", "what a researcher's run may name as its model"),
            ("data folders", "\n".join(self.data) or "none", "whose files runs may name by their path inside"),
            ("builders", ", ".join(self.builders), f"of emulators; {FIRST} hands out the base itself"),
            ("methods", ", ".join(self.methods), "blocks publishes layers of the base, trained a little"),
            ("most disclosed", f"{self.max_disclosed:.0%}", f"verbatim {share}"),
            ("with few bits", f"{self.max_disclosed_lossy:.0%}", f"verbatim or rounded {share}"),
            (
                "merged models",
                ", ".join(self.merged) or "owners only",
                "who may have the base with the change in it, or parts of it in an adapter",
            ),
            (
                "gate",
                render(self.gate) if self.gate else "none",
                "what must hold, or nothing of a run is published",
            ),
            ("probes", "\n".join(self.probes.values()) or "none", "texts that the gate reads"),
            ("continued runs", "yes" if self.continued else "no", "from a version of another run of theirs"),
            ("most rounds", str(self.max_rounds), "of one run and of those that it goes on from"),
            ("most steps", str(self.max_steps), "of one round at one site"),
            (
                "most tuning",
                f"{self.max_tuning_steps} steps",
                "of a builder, a realignment, an attack or the base itself, on the owner's machine",
            ),
            ("largest batch", f"{self.max_batch_size} of {self.max_length} tokens", "sequences of one step"),
            ("largest rank", str(self.max_rank), "or width, of what is beside a map"),
            ("most sites", str(self.max_sites), "of one run"),
            ("live runs", str(self.max_live_runs), "of one researcher at a time"),
            ("highest priority", str(self.max_priority), "of a run's tasks at sites; an owner's runs have any"),
            ("largest adapter", f"{self.max_adapter_mib:g} MiB", "that sites start from and send back"),
            ("largest emulator", f"{self.max_bundle_mib:g} MiB", "that each site downloads"),
        ]


def _disclosure(choice: Choice) -> str:
    """Say what of the base's weights the adapters of a method disclose; raises InputError for unfit settings."""
    try:
        disclosure: str = METHODS.make(choice.name, choice.settings).disclosure
    except ValueError as error:
        raise InputError(str(error)) from error
    return disclosure


def _folder(policy: Path, place: str) -> Path:
    return (policy.resolve().parent / Path(place).expanduser()).resolve()


def _model(policy: Path, name: str, place: str) -> str:
    """Return the folder of a model, or its file, or its hub id or name in the zoo as it is."""
    folder = _folder(policy, place)
    if folder.exists():
        return str(folder)
    if not fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", place):
        raise InputError(
            f"{policy}: models: {name}: {place} is neither a folder, a file, a hub id nor a name from the zoo"
        )
    return place


def _texts(spec: RunSpec) -> list[str]:
    files = (*spec.evaluation.values(), *spec.probes.values())
    return [name for name in (spec.public, spec.calibration, spec.attack_text, *files) if name]


def _largest(choice: Choice, *settings: str) -> int:
    """Return the largest of some settings of a plug-in, or of the values in one that is a table.

    What is no whole number is for the plug-in to refuse.
    """
    given = [choice.settings.get(name) for name in settings]
    values = [one for value in given for one in (value.values() if isinstance(value, Mapping) else [value])]
    return max([0, *(value for value in values if isinstance(value, int))])


def _refused(bound: str, reason: str) -> RefusedError:
    return RefusedError(f"the owner's policy refuses the run ({bound}): {reason}")
