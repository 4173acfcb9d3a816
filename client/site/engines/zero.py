"""DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054), stages 0 to 3. The one file that opens deepspeed.

Neither its fp16 nor its bf16 mode is on: the frozen weights come in their own precision, what trains stays fp32.
"""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from offsite.client.site.engines.base import Ranks, Share, check_rows, hold, mean, spare
from offsite.client.site.job import EngineSpec
from offsite.emulator import optimisers, retention
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.modality import Batch
from offsite.emulator.retention import Penalising, Pulling
from offsite.emulator.retention.objective import objective_of
from offsite.emulator.tuning.adapting import optimizer, set_rate, shares
from offsite.kernels.schema import TensorMap
from offsite.protos.errors import InputError
from offsite.protos.spec import LocalTraining

# What deepspeed imports only when it is first used, and torch's compiler with it.
LATE = "deepspeed.runtime.zero.muon.muon_optimizer"


class Zero:
    """Spreads optimiser, gradients and parameters over the processes."""

    @classmethod
    def preload(cls) -> None:
        """Import deepspeed, unless there is a GPU, which it would ask what it can do; a trainer does that itself."""
        with contextlib.suppress(InputError, ImportError):  # a trainer will say so, if it needs it
            if not torch.cuda.device_count():
                _import()
                importlib.import_module(LATE)

    @classmethod
    def check(cls, training: LocalTraining, spec: EngineSpec) -> None:
        """Refuse an optimiser that cannot work on a part of the values, in any order, or takes no gradient.

        DeepSpeed hands it flat pieces of all tensors together, and has computed their gradients before. It steps
        copies of its own, so that no retention can move what trains, and has spread it in stage 3, where none sees it.
        """
        check_rows(training, spec)
        optimiser = optimisers.make(training.optimiser.name, training.optimiser.settings)
        if not optimiser.elementwise or optimiser.forward_only:
            what = "takes losses and no gradient" if optimiser.forward_only else "needs whole matrices"
            raise InputError(
                f"the optimiser {optimiser.name} {what}, and the engine 'deepspeed' has flat pieces of gradients; the "
                "engine 'plain' can take its steps (--engine plain)"
            )
        held = retention.make(training.retention.name, training.retention.settings)
        if isinstance(held, Pulling) or (isinstance(held, Penalising) and spec.zero_stage == 3):
            what = "moves what trains after each step" if isinstance(held, Pulling) else "looks at what trains as whole"
            where = "has copies of its own of it" if isinstance(held, Pulling) else "has spread it in stage 3"
            raise InputError(
                f"the retention {held.name} {what}, and the engine 'deepspeed' {where}; the engine 'plain' can train "
                "so (--engine plain)"
            )

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        training: LocalTraining,
        spec: EngineSpec,
        ranks: Ranks,
        *,
        first_step: int = 0,
        anchor: TensorMap | None = None,
    ) -> None:
        """Take a model with its adapter attached; raises InputError where DeepSpeed is not installed."""
        self._deepspeed = _import()
        self._training, self._ranks, self._spec = training, ranks, spec
        pieces = spec.pieces(training.batch_size)
        self._share = partial(Share, ranks=ranks, pieces=pieces, packing=spec.packing)
        self._optimizer = optimizer(list(trained.values()), training, first_step=first_step)
        config = configuration(spec, training, ranks)
        if spec.zero_stage == 3:
            # Before the engine would move the whole model to the device, which is what stage 3 is there to avoid.
            self._deepspeed.zero.Init(module=model, config_dict_or_path=config)
        self._engine, *_ = self._deepspeed.initialize(
            model=spare(model, spec),
            optimizer=self._optimizer,
            model_parameters=list(trained.values()),
            config=config,
            dist_init_required=False,
        )
        self._objective = objective_of(training)
        self._shares, self._steps = shares(training), 0
        self._hold = hold(training, trained, anchor)

    @property
    def model(self) -> nn.Module:
        """DeepSpeed's engine, which brings what stage 3 has spread together."""
        module: nn.Module = self._engine
        return module

    def step(self, batch: Batch) -> float:
        """Take one optimiser step on a batch and return its mean loss before the step."""
        set_rate(self._optimizer, self._training.learning_rate * self._shares[self._steps])
        own = list[torch.Tensor]()
        for loss in self._share(batch).losses(self._engine, self._objective):
            held = loss if own else self._hold.added_to(loss)  # a penalty counts once
            self._engine.backward(held, scale_wrt_gas=False)  # pieces have their weights
            self._engine.step()  # of DeepSpeed's: the optimiser's is taken after the last piece
            own.append(loss.detach())
        self._steps += 1
        return mean(torch.stack(own).sum(), self._ranks)

    def gather(self, method: Method, places: Mapping[int, int]) -> Adapter:
        """Read the adapter off the model; in stage 3 every process holds it whole for a moment."""
        model = self._engine.module
        trained = list(method.named_parameters(model, places).values())
        with self._deepspeed.zero.GatheredParameters(trained, enabled=self._spec.zero_stage == 3):
            return method.state(model, places)


def configuration(spec: EngineSpec, training: LocalTraining, ranks: Ranks) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a job."""
    pieces = spec.pieces(training.batch_size)
    zero: dict[str, Any] = {"stage": spec.zero_stage}
    if spec.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if spec.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": max(1, training.batch_size // ranks.world // pieces),  # for its own reports
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's optimiser in all stages; DeepSpeed's own would be compiled here
    }


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Have a package look as if it were not installed, unless it has been imported."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]  # so that importing it raises ImportError
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


def _import() -> Any:
    """Import deepspeed, seconds slow and not installed at every site, so that nothing of it is compiled or printed."""
    try:
        with _without("mlflow"):  # which its autotuner takes where it can, and which brings a thread into what forks
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise InputError(
            f"the engine 'deepspeed' is not installed here ({error}); the engine 'plain' needs no more"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It would be compiled for minutes, and a process killed meanwhile leaves a lock on which all later ones hang.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
