"""What the agent asks a trainer process to do. Imports no tensor library."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from offsite.client.site.policy import Policy
from offsite.protos.documents import document
from offsite.protos.ranges import Count, Flag, Place, Positive
from offsite.protos.spec import Manifest, TaskSpec

Places = Annotated[tuple[Place, ...], Field(max_length=10_000)]


@document
class EngineSpec:
    """How a site runs its training steps; the result is the same, the memory and the speed are not."""

    name: Literal["plain", "deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 2  # what deepspeed spreads: 1 optimiser, 2 and gradients, 3 and parameters
    offload: Flag = False  # deepspeed only, from stage 1: keep what is spread in main memory
    processes: Positive = 1  # one for each GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPUs if there are any
    launcher: Place = ""  # a command that starts the processes, on other machines too; empty: they are ours
    threads: Count = 0  # of each process; 0: as the environment says
    micro_batch: Count = 0  # sequences that a process has in work at once; 0: all, and half as many where memory ends
    packing: Flag = False  # run sequences one behind the other, without padding, where the model takes them so
    checkpointing: Flag = False  # keep what layers read alone, and compute the rest of their activations twice

    def __post_init__(self) -> None:
        """Refuse an offload that would do nothing."""
        if self.offload and (self.name != "deepspeed" or self.zero_stage == 0):
            raise ValueError("offload needs the engine 'deepspeed' with zero_stage 1, 2 or 3")

    def pieces(self, batch_size: int) -> int:
        """How many pieces the rows of each process are cut into, of a batch of so many; each process has a row of each.

        Their gradients are added up before a step is taken.
        """
        most = -(-batch_size // self.processes)
        return min(-(-most // (self.micro_batch or most)), batch_size // self.processes)

    def halved(self, batch_size: int) -> "EngineSpec | None":
        """Return the same with half as many rows in work at once; None where they are cut as small as can be."""
        if self.pieces(batch_size) == batch_size // self.processes:
            return None
        most = -(-batch_size // self.processes)
        return replace(self, micro_batch=-(-min(self.micro_batch or most, most) // 2))

    @property
    def whole(self) -> bool:
        """Whether every process holds all parameters of the model."""
        return self.name != "deepspeed" or self.zero_stage < 3

    @property
    def title(self) -> str:
        """The engine in a few words, as metrics name it."""
        stage = f" zero-{self.zero_stage}{' offload' if self.offload else ''}" if self.name == "deepspeed" else ""
        return f"{self.name}{stage}, processes: {self.processes}"


@document
class TrainerJob:
    """One task, with everything it needs on local disk. Paths are absolute."""

    bundle: Place  # folder
    manifest: Manifest
    adapter: Place  # the broadcast, a safetensors file
    anchor: Place = ""  # what the task's retention holds training to, another one; empty: it needs none
    data: Place  # a file or folder of examples
    policy: Policy  # of the site
    task: TaskSpec
    engine: EngineSpec = EngineSpec()
    secret: Place  # file of the site's secret, from which stages of an upload draw
    residual: Place = ""  # file of what stages left out of the site's last update; empty: none of them did
    reservoirs: Places = ()  # files of rows that were kept of earlier tasks
    out: Place  # folder, made by the trainer: the update and its digest, metrics.json, perhaps what stages left out
