"""Tries the charts on one machine, without a cluster: two sites tune a tiny random model, and a researcher fetches it.

    python deploy/helm/try.py [--helm PROGRAM] [--tag TAG] [--postgresql IMAGE] [--s3 IMAGE] OUT

As root, with podman; deploy/docker/build.sh builds the images. It renders the coordinator's chart and two of sites, and
runs their pods as pods.py says: two gateways, each beside a node of Ray, a head and a worker, PostgreSQL and S3, each
in containers of its own, and sites that join by tokens and see nothing but the gateway. OUT is a new folder.
"""

import argparse
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pods import Files, Pods, podman, ready, set_up

HERE = Path(__file__).resolve().parent
COMPOSE = HERE.parent / "compose"
RELEASE, SITES = "tuning", ("bank", "hospital")
INSIDE, OUTSIDE = "offsite-cluster", "offsite-sites"  # networks
DEADLINE_S = 900.0


def say(what: str) -> None:
    """Print a headline."""
    print(f"\n== {what} ({time.monotonic() - BEGUN:.0f} s)", flush=True)


def wait(missing: Callable[[], str]) -> None:
    """Ask again and again until nothing is missing; raises SystemExit with what still is when time is up."""
    until = time.monotonic() + DEADLINE_S
    while what := missing():
        if time.monotonic() > until:
            raise SystemExit(f"within {DEADLINE_S:.0f} s there was no end to this: {what}")
        time.sleep(2)


class Trial:
    """One try, in a folder of its own."""

    def __init__(self, asked: argparse.Namespace, folder: Path, memory: Path) -> None:
        self._asked, self._folder = asked, folder
        self._password, self._files = secrets.token_hex(16), Files()
        self.pods = Pods(folder, memory, self._files)
        self._image = f"localhost/offsite-coordinator:{asked.tag}"
        for name in ("owner", "alice", "model"):
            (folder / name).mkdir()
            (folder / name).chmod(0o777)

    def offsite(self, who: str, *arguments: str, network: str = "none", mounts: tuple[str, ...] = ()) -> str:
        """Run a command of somebody's in a container of its own, and return what it prints."""
        options = [f"--volume={self._folder / who}:/var/lib/offsite", *(f"--volume={mount}" for mount in mounts)]
        locked = [
            "--no-healthcheck",
            "--read-only",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            f"--network={network}",
        ]
        return str(podman("run", "--rm", *locked, *options, self._image, *arguments))

    def prepare(self) -> None:
        """Make the model, the authority with what it hands out, and the Secrets of all parties."""
        tiny = [
            f"--volume={COMPOSE}:/here:ro",
            f"--volume={self._folder / 'model'}:/model",
            "--network=none",
            "--no-healthcheck",
        ]
        podman("run", "--rm", *tiny, "--entrypoint=python3", self._image, "/here/tiny.py", "/model", "/here/texts")
        pki = ("owner", "pki")
        self.offsite(*pki, "init", "authority")
        self.offsite(*pki, "issue", "authority", "--role", "coordinator", "coordinator", "--host", RELEASE)
        self.offsite(*pki, "issue", "authority", "--role", "owner", "olga")
        self.offsite(*pki, "issue", "authority", "--role", "researcher", "alice")
        for site in SITES:
            token = self.offsite(*pki, "token", "authority", site, "--role", "site", "--address", f"{RELEASE}:8443")
            self._files[f"{site}-token"] = {"token": token}
        authority = self._folder / "owner" / "authority"
        kit = {path.name: path.read_text() for path in (authority / "coordinator").iterdir()}
        self._files["offsite-kit"] = kit | {"crl.pem": (authority / "crl.pem").read_text()}
        self._files[RELEASE] = {"auth_token": secrets.token_hex(32)}
        self._files["offsite-journal"] = {
            "OFFSITE_JOURNAL": f"postgresql://offsite:{self._password}@postgresql/offsite"
        }
        self._files["offsite-blobs"] = {
            "OFFSITE_BLOBS": "s3://offsite?endpoint=http://s3:9000&region=us-east-1",
            **{"AWS_ACCESS_KEY_ID": "offsite", "AWS_SECRET_ACCESS_KEY": self._password, "AWS_ALLOW_HTTP": "true"},
        }

    def stores(self) -> None:
        """Start both stores, with the commands of stores.yaml."""
        services = yaml.safe_load((COMPOSE / "stores.yaml").read_text())["services"]
        for name, image in (("postgresql", self._asked.postgresql), ("s3", self._asked.s3)):
            service = services[name]
            command = [word.replace("${PASSWORD}", self._password) for word in service.get("command", [])]
            entry = [word.replace("$$", "$") for word in service.get("entrypoint", [])]
            options = [f"--env={key}={value}" for key, value in service.get("environment", {}).items()]
            options = [
                option.partition("=${")[0] + f"={self._password}" if "${" in option else option for option in options
            ]
            options += [f"--entrypoint={json.dumps(entry)}"] if entry else []
            options += [f"--name={RELEASE}-{name}", f"--network={INSIDE}", f"--network-alias={name}"]
            podman("run", "--detach", "--rm", *options, image or service["image"], *command)

    def coordinate(self) -> None:
        """Start the pods of the coordinator's chart, Ray's first, and wait until they are ready."""
        places = {"texts": COMPOSE / "texts", "model": self._folder / "model"}
        limits = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}}
        values = {
            "replicas": 2,
            "policy": (COMPOSE / "owner.toml").read_text(),
            "volumes": [{"name": name, "hostPath": {"path": str(place)}} for name, place in places.items()],
            "volumeMounts": [{"name": name, "mountPath": f"/srv/offsite/{name}", "readOnly": True} for name in places],
            "ray": {"workers": [{"name": "cpu", "replicas": 1, "resources": limits}], "objectStore": "256Mi"},
        }
        workloads = self._rendered("offsite-coordinator", RELEASE, values)
        for name, spec in sorted(
            (pod for one in workloads for pod in set_up(one)), key=lambda pod: "-head" not in pod[0]
        ):
            gateway = spec["containers"][0]["name"] == "gateway"
            aliases = [RELEASE] if gateway else [f"{RELEASE}-head-svc"] if name.endswith("-head") else [name]
            self.pods.start(name, spec, networks=[INSIDE, OUTSIDE] if gateway else [INSIDE], aliases=aliases)
            wait(partial(ready, name, spec))
            print(f"{name} is ready", flush=True)

    def join(self) -> None:
        """Start the pods of sites, which ask until the owner has signed, and sign."""

        def site(name: str) -> None:
            values = {
                "coordinator": f"{RELEASE}:8443",
                "policy": (COMPOSE / "policy.toml").read_text(),
                "identity": {"tokenSecret": f"{name}-token"},
                "data": {"hostPath": {"path": str(COMPOSE / "data" / name)}, "persistentVolumeClaim": None},
                "trainer": {"threads": 1},
            }
            for one in self._rendered("offsite-site", name, values):
                for pod, spec in set_up(one):
                    self.pods.start(pod, spec, networks=[OUTSIDE], aliases=[pod])
                    wait(partial(ready, pod, spec))
                    print(f"{pod} is ready", flush=True)

        where = ("--coordinator", f"{RELEASE}:8443", "--identity", "authority/olga")
        with ThreadPoolExecutor() as pool:
            starting = [pool.submit(site, name) for name in SITES]
            while not all(one.done() for one in starting):
                self.offsite("owner", "identity", "sign", "authority", *where, network=INSIDE)
                time.sleep(2)
        for one in starting:
            one.result()

    def research(self) -> None:
        """Submit a run, follow it, and fetch what it gives."""
        kit = self._folder / "owner" / "authority" / "alice"
        mounts = (f"{COMPOSE / 'run.toml'}:/srv/run.toml:ro", f"{kit}:/var/lib/offsite/kit", f"{self._asked.out}:/out")

        def run(*arguments: str) -> str:
            who = ("--coordinator", f"{RELEASE}:8443", "--identity", "kit")
            return self.offsite("alice", "run", *arguments, *who, network=INSIDE, mounts=mounts)

        wait(lambda: ", ".join(sorted(set(SITES) - set(run("sites").split()))))
        print(run("submit", "/srv/run.toml", "--watch"))
        (made,) = json.loads(run("list", "--format", "json"))
        run("fetch", made["id"], "/out/outcome")

    def _rendered(self, chart: str, release: str, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Render a chart; its ConfigMaps are kept, its workloads returned."""
        image = {"repository": f"localhost/{chart}", "tag": self._asked.tag}
        given = self._folder / f"{release}.yaml"
        given.write_text(yaml.safe_dump({"image": image, **values}))
        command = [self._asked.helm, "template", release, str(HERE / chart), "--values", str(given)]
        manifests = list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True).stdout))
        self._files.update({one["metadata"]["name"]: one["data"] for one in manifests if one["kind"] == "ConfigMap"})
        return [one for one in manifests if one["kind"] in ("StatefulSet", "RayCluster")]


def main() -> None:
    """Do it all; end and remove all of it however that goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--helm", default="helm")
    parser.add_argument("--tag", default="0.1.0")
    parser.add_argument("--postgresql", default="", help="Image; that of stores.yaml if not given.")
    parser.add_argument("--s3", default="", help="Image; that of stores.yaml if not given.")
    asked = parser.parse_args()
    asked.out = asked.out.resolve()
    asked.out.mkdir()
    asked.out.chmod(0o777)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        Path(scratch).chmod(0o755)
        Path(memory).chmod(0o755)
        trial = Trial(asked, Path(scratch), Path(memory))
        try:
            for network in (INSIDE, OUTSIDE):
                podman("network", "create", "--internal", network)
            for what in (trial.prepare, trial.stores, trial.coordinate, trial.join, trial.research):
                say(str(what.__doc__).split(";")[0].rstrip("."))
                what()
        except BaseException:
            print(*trial.pods.logs(), sep="\n", file=sys.stderr)
            raise
        finally:
            trial.pods.end()
            for name in ("postgresql", "s3"):
                podman("rm", "--force", "--ignore", "--volumes", f"{RELEASE}-{name}")
            podman("network", "rm", "--force", INSIDE, OUTSIDE)
    say(f"done: {asked.out / 'outcome'}")


BEGUN = time.monotonic()
if __name__ == "__main__":
    main()
