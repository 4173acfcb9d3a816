"""pfl-research's side of `simulate.py`: users that move a numpy model a little, through its own simulated backend.

    python peer_pfl.py '{"shapes": [[8, 320], ...], "users": 2000, "rounds": 2, "step_s": 0.0}'

It prints the users a second of the rounds after the first, and its memory.
"""

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import ModelHyperParams
from pfl.metrics import Metrics
from pfl.model.base import StatefulModel
from pfl.stats import MappedVectorStatistics

ASKED = json.loads(sys.argv[1])


class Arrays(StatefulModel):
    """Named arrays, and no more."""

    def __init__(self, shapes: list[list[int]]) -> None:
        self.arrays = {str(number): np.zeros(shape, np.float32) for number, shape in enumerate(shapes)}

    def get_parameters(self, placeholders: Any = None) -> Any:
        if placeholders is None:
            return MappedVectorStatistics({name: array.copy() for name, array in self.arrays.items()})
        for name, array in self.arrays.items():
            np.copyto(placeholders[name], array)
        return placeholders

    def set_parameters(self, w: Any) -> None:
        for name, array in self.arrays.items():
            np.copyto(array, w[name])

    def get_model_difference(self, other_parameters: Any, clone: bool = False) -> Any:
        return MappedVectorStatistics(
            {name: array - other_parameters[name] for name, array in self.arrays.items()}, weight=10
        )

    def apply_model_update(self, statistics: Any) -> Any:
        for name, array in self.arrays.items():
            array += statistics[name]
        return self, Metrics()

    def evaluate(self, *_: Any) -> Metrics:
        return Metrics()

    def save(self, dir_path: str) -> None:
        np.savez(Path(dir_path) / "arrays.npz", **self.arrays)

    def load(self, dir_path: str) -> None:
        self.set_parameters(np.load(Path(dir_path) / "arrays.npz"))


class Moving(FederatedAveraging):
    """Federated averaging of what users add."""

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        for array in model.arrays.values():
            array += np.float32(1e-3)
        if ASKED["step_s"]:
            time.sleep(ASKED["step_s"])
        return model.get_model_difference(initial_model_state), Metrics()


class Times(TrainingProcessCallback):
    """When each round ended."""

    ends: list[float] = []

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        self.ends.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """Run it."""
    users = list(range(ASKED["users"]))
    rows = np.zeros((10, 1), np.float32)
    data = FederatedDataset(lambda user: Dataset([rows], user_id=str(user)), itertools.cycle(users).__next__)
    params = NNAlgorithmParams(
        central_num_iterations=ASKED["rounds"],
        evaluation_frequency=10**6,
        train_cohort_size=len(users),
        val_cohort_size=None,
    )
    times, begun = Times(), time.perf_counter()
    Moving().run(
        params,
        SimulatedBackend(data, data),
        Arrays(ASKED["shapes"]),
        ModelHyperParams(),
        callbacks=[times],
        send_metrics_to_platform=False,
    )
    ends = [begun, *times.ends]
    rates = [len(users) / (end - begin) for begin, end in zip(ends, ends[1:], strict=False)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"users_per_s": rates, "memory_mb": memory}))


if __name__ == "__main__":
    main()
