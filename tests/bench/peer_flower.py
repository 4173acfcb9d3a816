"""Flower's side of `simulate.py`: clients that move numpy arrays a little, through its own simulation engine.

    python peer_flower.py '{"shapes": [[8, 320], ...], "users": 500, "rounds": 2, "step_s": 0.0}'

It prints the users a second of the rounds after the first, and the most memory of all of its processes.
"""

import json
import os
import sys
import time

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # nothing is sent to anybody

import numpy as np
import psutil
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

ASKED = json.loads(sys.argv[1])
client, server = ClientApp(), ServerApp()
ends: list[float] = []
memory: list[float] = []


@client.train()
def train(message: Message, context: Context) -> Message:
    """Add a constant to each array, after a pause."""
    arrays = [array + np.float32(1e-3) for array in message.content["arrays"].to_numpy_ndarrays()]
    if ASKED["step_s"]:
        time.sleep(ASKED["step_s"])
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 10})})
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """Federated averaging that notes when a round has ended."""

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        result = super().aggregate_train(server_round, replies)
        ends.append(time.perf_counter())
        process = psutil.Process()
        family = [process, *process.children(recursive=True)]
        memory.append(sum(one.memory_full_info().pss for one in family) / 2**20)
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, with all clients in each and none to evaluate."""
    arrays = ArrayRecord([np.zeros(shape, np.float32) for shape in ASKED["shapes"]])
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=ASKED["users"])
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=ASKED["rounds"])


if __name__ == "__main__":
    resources = {"num_cpus": 1, "num_gpus": 0}
    config = {"client_resources": resources, "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False}}
    run_simulation(server, client, num_supernodes=ASKED["users"], backend_config=config)
    rates = [ASKED["users"] / (end - begin) for begin, end in zip(ends, ends[1:], strict=False)]
    print(json.dumps({"users_per_s": rates, "memory_mb": max(memory)}))
