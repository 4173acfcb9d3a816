"""A launcher of two nodes of one process each: torchrun twice on this machine, as on two that meet at an address."""

import subprocess
import sys

port, *command = sys.argv[1:]
torchrun = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nnodes", "2", "--nproc-per-node", "1"]
torchrun += ["--master-addr", "127.0.0.1", "--master-port", port]
nodes = [subprocess.Popen([*torchrun, "--node-rank", str(node), *command]) for node in range(2)]
sys.exit(max(abs(node.wait()) for node in nodes))
