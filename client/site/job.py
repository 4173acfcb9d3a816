"""What the agent asks a trainer process to do. Imports no tensor library."""

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
    threads: Count = 0  # of each process; 0: as the environment says

    def __post_init__(self) -> None:
        """Refuse an offload that would do nothing."""
        if self.offload and (self.name != "deepspeed" or self.zero_stage == 0):
            raise ValueError("offload needs the engine 'deepspeed' with zero_stage 1, 2 or 3")

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
