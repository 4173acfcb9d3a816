"""Whether the demo's own run has the same bytes on machines that share no folder, though one dies in each round.

    python tests/bench/machines.py [--rounds 2] [--steps 6] [--examples 72] [--out DIR]

As root, since it makes machines: network, mount and process namespaces with a cable to one switch. First it plays
`offsite demo`: SmolLM2 and four sites with DeepSpeed, on one node, with SQLite and a folder. Then it takes that run as
the demo's researcher submitted it, with the demo's texts and policies, to other processes: two gateways and the sites
on a machine that does no step, PostgreSQL, S3, and two machines for steps, which hold nothing of the owner's. In the
first round the machine that does a step is killed, in the second the gateway that dispatches. All of it is real but
the death of a machine, which is that of its processes and of its cable.

It prints a JSON line: whether adapter and figures are those of the demo, and what each of the two took. Exit code 1
says that they are not. It takes some ten minutes on two cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.conftest import S3, Postgresql
from tests.integration.clusters import Cluster
from tests.integration.conftest import Federation, federated, wait_until
from tests.integration.machines import Machine, machines

from offsite.client import Run, RunSpec
from offsite.coordinator.store.opening import open_journal
from offsite.emulator import zoo
from offsite.protos.chunks import digest_file
from offsite.protos.documents import from_json

MODEL = "smollm2-135m-instruct"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
}  # of both, so of each step
KEY = {"AWS_ACCESS_KEY_ID": "offsite", "AWS_SECRET_ACCESS_KEY": "confidential", "AWS_ALLOW_HTTP": "true"}
GATEWAYS = ("north", "south")


def play(out: Path, asked: argparse.Namespace) -> RunSpec:
    """Play the demo, and return what its researcher submitted."""
    model = shutil.copytree(zoo.locate(MODEL, cache=zoo.cache_folder()), out.parent / "model")
    sizes = [f"--{name}={getattr(asked, name)}" for name in ("rounds", "steps", "examples")]
    command = [sys.executable, "-m", "offsite.client", "demo", "--out", str(out), "--model", str(model), *sizes]
    subprocess.run(command, check=True, stdout=sys.stderr)
    with closing(open_journal(f"sqlite://{out}/work/home/journal.db")) as journal:
        (row,) = journal.runs()
    return from_json(RunSpec, row.spec, where="the demo's run")


def join(federation: Federation, played: Path, site: str) -> None:
    """Start a site as the demo does, with what that site has there."""
    kit, folder = federation.authority.issue("site", site), played / "work" / "sites" / site
    work = federation.folder / "work" / site
    federation.start(
        site,
        *("site", "join", federation.address, "--identity", str(kit), "--policy", str(folder / "policy.toml")),
        *("--data", str(folder / "train.jsonl"), "--work", str(work), "--format", "json"),
        *("--engine", "deepspeed", "--zero-stage", "2"),
    )
    federation.expect(site, "enrolled")


@contextmanager
def coordinated(made: list[Machine], played: Path) -> Iterator[tuple[Federation, Cluster]]:
    """A cluster of these machines, both stores, and two gateways on the first machine."""
    head = made[0]
    with ExitStack() as stack:
        cluster = Cluster(made, wait_until)
        for machine in made:
            cluster.start(machine, cpus=0 if machine is head else 1)
        server = Postgresql()
        stack.callback(server.close)
        bucket = S3(head.folder / "buckets", machine=head)
        stack.callback(bucket.kill)
        stores = {"OFFSITE_JOURNAL": server.empty(), "OFFSITE_BLOBS": bucket.url(cache="2G")}
        environment = stores | cluster.environment(head)
        federation = stack.enter_context(federated(head.folder / "owner", played, machine=head, **environment))
        policy = (played / "work" / "owner.toml").read_text()
        # As many threads a step as in the demo: what is summed in another order is not the same to the bit.
        joined = ("--ray-address", cluster.address, "--threads", "0")
        addresses = [
            federation.coordinate(*joined, name=name, home=name, executor="ray", policy=policy) for name in GATEWAYS
        ]
        federation.address = ",".join(addresses)
        yield federation, cluster


def busy(cluster: Cluster) -> Machine | None:
    """Return a machine that does a step now."""
    doing = {
        one["address"] for one in cluster.status()["machines"] if one["free"].get("CPU") != one["resources"].get("CPU")
    }
    return next((machine for machine in cluster.workers if machine.address in doing), None)


def follow(run: Run, federation: Federation, cluster: Cluster) -> dict[str, Any]:
    """See a run to its end; kill the machine that does a step in its first round, the gateway in its second."""
    killed: dict[str, Any] = {}
    for event in run.watch():
        print(
            f"{time.strftime('%H:%M:%S')}  {event.kind} {event.data.get('step', '')} {event.round or ''} {event.site}",
            file=sys.stderr,
        )
        if event.kind == "bundle":
            machine = wait_until(lambda: busy(cluster), "a step on a machine")
            machine.kill()
            killed["machine"] = machine.address
        if event.kind == "update" and event.round == 2 and "gateway" not in killed:
            federation.kill(GATEWAYS[0])
            federation.expect(GATEWAYS[1], "dispatches")
            killed["gateway"] = GATEWAYS[0]
    if run.state != "completed":
        raise SystemExit(f"the run {run.state}: {run.error}")
    return killed


def outcome(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same."""
    figures = {name: report["overall"][name] for name in ("base_zero_shot", "emulator_tuned", "plug_in")}
    return {"adapter": digest_file(folder / "adapter" / "adapter_model.safetensors"), "figures": figures}


def main() -> None:
    """Play the demo, do its run again on machines, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--examples", type=int, default=72)
    parser.add_argument("--out", type=Path, help="Where the adapters, reports and logs of both are put.")
    asked = parser.parse_args()
    os.environ.update(ENVIRONMENT | KEY)
    with machines("head", "left", "right") as made:
        played = made[0].folder / "demo"
        try:
            begun = time.monotonic()
            spec = play(played, asked)
            demo_s = time.monotonic() - begun
            wanted = outcome(played, json.loads((played / "report.json").read_text()))
            with coordinated(made, played) as (federation, cluster):
                for site in spec.sites:
                    join(federation, played, site)
                with federation.connect(federation.researcher) as session:
                    begun = time.monotonic()
                    run = session.submit(spec)
                    killed = follow(run, federation, cluster)
                    run_s = time.monotonic() - begun
                    got = outcome(Path(run.result(made[0].folder / "machines")), run.report)
        finally:
            if asked.out:
                shutil.copytree(
                    made[0].folder, asked.out, ignore=shutil.ignore_patterns("tmp", "buckets", "model", "ray-token")
                )
    print(json.dumps({"same": got == wanted, "killed": killed, "demo_s": round(demo_s), "run_s": round(run_s), **got}))
    raise SystemExit(got != wanted)


if __name__ == "__main__":
    main()
