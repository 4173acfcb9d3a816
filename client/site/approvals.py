"""What a person at a site allows: one file for each request, in the folder `approvals` of the site's work folder.

The file is the truth, for the agent and for whoever decides: it says what is asked for, in words, and what was decided,
by whom and when. It is named by a digest of what the signed task asks for, so that a task that asks for anything else,
such as more steps, asks anew.
"""

import getpass
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from offsite.client.site.policy import MIB, Policy
from offsite.protos.chunks import digest_bytes, hex_of
from offsite.protos.documents import document, from_json, to_json
from offsite.protos.errors import ConflictError, InputError, NotFoundError
from offsite.protos.ranges import Line, Moment, Name, Sentence
from offsite.protos.recipes import render
from offsite.protos.spec import LocalTraining, TaskSpec

FOLDER = "approvals"
LENGTH = 12  # hex digits of a request's name
OF_A_ROUND = ("round", "attempt", "adapter", "adapter_size", "previous", "update_size")  # which differ in each of a run

Plan = Annotated[tuple[Sentence, ...], Field(max_length=64)]


@document
class Request:
    """What a site is asked to do, and what a person has decided about it."""

    id: Line
    run: Name
    plan: Plan
    state: Literal["pending", "approved", "rejected"] = "pending"
    by: Line = ""  # who decided
    why: Line = ""
    asked_at: Moment
    decided_at: Moment = 0.0


def request(task: TaskSpec, policy: Policy, *, asked_by: str) -> Request | None:
    """Return what a person has to decide before a task is done; None where the policy asks nobody."""
    if policy.approve == "none":
        return None
    return Request(
        id=_essence(task, by_round=policy.approve == "each"),
        run=task.run,
        plan=tuple(plan(task, policy, asked_by=asked_by)),
        asked_at=time.time(),
    )


def _essence(task: TaskSpec, *, by_round: bool) -> str:
    """Return the name of what a task asks for, the same in all rounds of a run unless each is decided on."""
    training = replace(task.training, before=0, after=task.training.before + task.training.after)
    fields = json.loads(to_json(replace(task, training=training)))
    for name in OF_A_ROUND:
        if name != "round" or not by_round:
            fields.pop(name, None)
    return hex_of(digest_bytes(json.dumps(fields, sort_keys=True).encode()), most=LENGTH)


def plan(task: TaskSpec, policy: Policy, *, asked_by: str) -> list[str]:
    """Say in words what a task asks for, what leaves the site, and what the policy bounds it by."""
    training = task.training
    one = f"{'a look at the version of ' if task.examines else ''}round {task.number} of {task.rounds}"
    rounds = one if policy.approve == "each" else f"rounds: {task.rounds}"
    before = f", which go on from round {task.continues.round} of {task.continues.run}" if task.continues else ""
    return [
        f"run {task.run}, {rounds}{before}",
        f"asked by: {asked_by}; signed by the model's owner",
        f"model: base {task.base}; the emulator is described by manifest {task.manifest}",
        f"method: {render((task.method,))}{f', tier {task.tier}' if task.tier else ''}",
        f"steps: {training.steps} a round (at most {policy.max_steps} allowed), of {training.batch_size} sequences "
        f"(at most {policy.max_batch_size}) of at most {training.max_length} tokens (at most {policy.max_length})",
        f"how: {_how(training)}",
        f"stages before the update leaves: {render(task.upload) or 'none'}",
        f"what leaves in a round: an update of {task.update_size / MIB:.3g} MiB (at most {policy.max_upload_mib:g}), "
        f"how many sequences and tokens it saw, and {_losses(task, policy)}",
    ]


def _how(training: LocalTraining) -> str:
    chosen = {"objective": training.objective, "optimiser": training.optimiser, "part": training.part}
    chosen |= {"retention": training.retention}
    words = [f"{name} {render((choice,))}" for name, choice in chosen.items()]
    return ", ".join([*words, f"learning rate {training.learning_rate:g}", f"weights in {training.precision}"])


def _losses(task: TaskSpec, policy: Policy) -> str:
    losses = "the loss of each step" if policy.per_step_metrics else "their mean loss"
    return f"{losses}, and what is measured on held-out rows as the policy lets it out" if task.exam else losses


class Approvals:
    """The requests of a work folder."""

    def __init__(self, work: Path) -> None:
        self._folder = work / FOLDER

    def ask(self, wish: Request) -> Request:
        """Return a request as it stands, written down if it is new."""
        file = self._file(wish.id)
        if not file.exists():
            self._write(wish)
        return self._read(file)

    def all(self) -> list[Request]:
        """Return all requests, the oldest first."""
        return sorted(map(self._read, self._folder.glob("*.json")), key=lambda one: one.asked_at)

    def decide(self, name: str, state: Literal["approved", "rejected"], *, why: str = "") -> Request:
        """Write down what the user of this process has decided; the last decision stands.

        Raises NotFoundError for a request that is not there.
        """
        file = self._file(name)
        if not file.exists():
            waiting = ", ".join(one.id for one in self.all() if one.state == "pending") or "none"
            raise NotFoundError(f"{self._folder}: there is no request {name}; those that wait: {waiting}")
        decided = replace(self._read(file), state=state, by=_user(), why=why, decided_at=time.time())
        self._write(decided)
        return decided

    def _file(self, name: str) -> Path:
        if not name.isalnum():
            raise InputError(
                f"a request is named by {LENGTH} hex digits, as `offsite site pending` shows, not {name!r}"
            )
        return self._folder / f"{name}.json"

    def _write(self, one: Request) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self._folder / f"{one.id}.partial"
        partial.write_bytes(to_json(one))
        partial.replace(self._file(one.id))

    def _read(self, file: Path) -> Request:
        try:
            return from_json(Request, file.read_bytes(), where=str(file))
        except InputError as error:
            raise ConflictError(f"{error}; restore the file, or remove it to be asked again") from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container that knows no names
        return "unknown"
