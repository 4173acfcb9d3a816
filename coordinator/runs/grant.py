"""A run as the owner let it in: the places its names stand for, and how it speaks of them to others."""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from offsite.protos.documents import document, plain
from offsite.protos.ranges import Count, Digest, Flag, Line, Moment, Name, Place, Positive, Sentence, Tier
from offsite.protos.spec import Ancestor, Choice, FileEntry, RunSpec

_ABSOLUTE = re.compile(r"(?<![\w./:~-])~?/(?:[^\s/'\"`,;:()]+/)*[^\s/'\"`,;:()]+")


@document
class Input:
    """A model or a text of the owner, once its files are among the blobs."""

    source: Place  # where it lies at the coordinator: a folder, or a file, whose path in it is "."
    files: tuple[FileEntry, ...]


@document
class Known:
    """What a run's task is known by."""

    method: Choice  # that measured it
    sums: Digest  # the file of what it gave


@document
class Replay:
    """A run that is done again without one of its sites."""

    run: Name
    round: Positive  # the first that the site took part in, counted from one
    site: Name
    by: Line  # who took it out, when, and why
    at: Moment
    reason: Sentence
    keeps: Flag  # whether what the others gave in that round is folded as it is
    joins: Flag = False  # whether sites could join it
    joined: dict[Count, dict[Name, Tier]] = Field(default_factory=dict)  # the others that did, by round of this run

    @property
    def words(self) -> str:
        """Why versions were taken back with it."""
        return f"site {self.site} was withdrawn from run {self.run}: {self.reason}"


@document
class Grant(RunSpec):
    """A run with the places of its model and texts, as its steps read them; it stays at the coordinator."""

    continues: Ancestor | None = None  # the version that `start` stands for
    known: Known | None = None  # what `known_by` stands for
    replays: Replay | None = None  # the run that it does again without a site
    role: Literal["owner", "researcher"] = "owner"  # of who submitted it
    names: dict[Place, Place] = Field(default_factory=dict)  # place -> what the run calls it
    folders: tuple[Place, ...] = ()  # that links inside a folder of texts may not leave; empty: anywhere
    whole: Flag = True  # whether its emulator may be the base with nothing removed
    base_name: Place = ""  # what sites and reports call the base; empty: as its folder is called
    inputs: dict[Place, Input] = Field(default_factory=dict)  # its model and texts by place, once they were gathered

    @property
    def rounds_before(self) -> int:
        """Rounds that led to the version that the run goes on from."""
        return self.continues.rounds if self.continues else 0

    @property
    def weights(self) -> int:
        """Bytes of the base's weights, once its files were gathered; 0 before."""
        model = self.inputs.get(self.model)
        return sum(file.size for file in model.files if file.path.endswith(".safetensors")) if model else 0

    def wording(self, error: BaseException, sentence: str = "") -> str:
        """Return an error's sentence, or the one given for it.

        For a researcher it is without paths of this machine and words of the owner's texts.
        """
        sentence = sentence or str(error)
        if self.role == "owner":
            return sentence
        return self.discreet(next((text for cause in _causes(error) if (text := _of_data(cause))), sentence))

    def fault(self, error: Exception) -> str:
        """Say what a fault of ours was."""
        return f"internal error: {type(error).__name__}: {plain(self.wording(error), most=300)}"

    def discreet(self, sentence: str) -> str:
        """Call places by the names the run has for them, and all others by their last part."""
        for place, name in sorted(self.names.items(), key=lambda pair: -len(pair[0])):
            sentence = sentence.replace(place, name)
        return _ABSOLUTE.sub(lambda path: path[0].rpartition("/")[2], sentence)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_data(error: BaseException) -> str:
    """Say what is wrong with a text without a word of it; empty if the error is of another kind."""
    reason, place = getattr(error, "reason", None), getattr(error, "place", None)
    if not isinstance(reason, str) or not isinstance(place, str):
        return ""
    return f"{place or 'a text of the run'}: among {reason}; the owner, who may read it, is told more"
