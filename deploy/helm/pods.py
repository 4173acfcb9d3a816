"""The pods of rendered charts, as podman runs them on one machine: to try charts where there is no cluster.

Made here as Kubernetes and KubeRay make it: pods with their users, read-only roots, limits, volumes, Secrets and names,
init containers before the others, probes, and `ray start` with the parameters of a RayCluster. Not made: services in
front of several pods, network policies, restarts by a probe.
"""

import json
import os
import shlex
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

GROUP = 10001  # fsGroup of all pods
Spec = dict[str, Any]
Files = dict[str, dict[str, str]]  # by a Secret's or a ConfigMap's name, then by key


@dataclass
class Pods:
    """Pods, and the folders that their volumes are in: on disk, and in memory."""

    folder: Path
    memory: Path
    files: Files
    _names: list[str] = field(default_factory=list)

    def start(self, name: str, spec: Spec, *, networks: list[str], aliases: list[str]) -> None:
        """Start a pod, once its init containers have ended well."""
        shared = "net,ipc,uts" + ",pid" * bool(spec.get("shareProcessNamespace"))
        where = [f"--network-alias={alias}" for alias in aliases] + [f"--network={','.join(networks)}"]
        podman(
            "pod",
            "create",
            f"--name={name}",
            f"--infra-name={name}-infra",
            f"--hostname={name}",
            f"--share={shared}",
            *where,
        )
        self._names.append(name)
        volumes = {one["name"]: self._volume(name, one) for one in spec["volumes"]}
        for one in spec.get("initContainers", []):
            podman("run", "--rm", *self._options(name, one, spec, volumes))
        for one in spec["containers"]:
            podman("run", "--detach", "--restart=always", *self._options(name, one, spec, volumes))

    def end(self) -> None:
        """End all pods."""
        for name in reversed(self._names):
            try:
                podman("pod", "rm", "--force", "--time=20", name)
            except RuntimeError:  # a process that was killed had not gone yet
                podman("pod", "rm", "--force", name)

    def logs(self) -> Iterator[str]:
        """Yield what each container said last."""
        for pod in self._names:
            for name in podman("ps", "--all", f"--filter=pod={pod}", "--format={{.Names}} {{.Status}}").splitlines():
                said = subprocess.run(["podman", "logs", "--tail=30", name.split()[0]], capture_output=True, text=True)
                yield f"== {name}\n{said.stdout}{said.stderr}"

    def _options(self, pod: str, container: Spec, spec: Spec, volumes: dict[str, str]) -> list[str]:
        """What `podman run` is told of a container."""
        user, limits = spec["securityContext"], container["resources"].get("limits", {})
        options = [
            f"--name={pod}-{container['name']}",
            f"--pod={pod}",
            "--read-only",
            "--read-only-tmpfs=false",
            "--no-healthcheck",
        ]
        options += ["--cap-drop=ALL", "--security-opt=no-new-privileges", "--stop-timeout=60"]
        options += [f"--user={user['runAsUser']}:{user['runAsGroup']}"]
        options += [f"--env={name}={value}" for name, value in self._environment(container)]
        for mount in container["volumeMounts"]:
            mode = "ro" if mount.get("readOnly") else "rw"
            options += [f"--volume={volumes[mount['name']]}:{mount['mountPath']}:{mode}"]
        if "memory" in limits:
            options += [f"--memory={limits['memory'].removesuffix('i').lower()}"]
        if "cpu" in limits:
            options += [f"--cpus={limits['cpu']}"]
        if "command" in container:
            options += [f"--entrypoint={json.dumps(container['command'])}"]
        return [*options, container["image"], *map(str, container.get("args", []))]

    def _environment(self, container: Spec) -> Iterator[tuple[str, str]]:
        for source in container.get("envFrom", []):
            yield from self.files[source["secretRef"]["name"]].items()
        for one in container.get("env", []):
            key = one.get("valueFrom", {}).get("secretKeyRef")
            yield one["name"], self.files[key["name"]][key["key"]] if key else one["value"]

    def _volume(self, pod: str, volume: Spec) -> str:
        """Make a volume of a pod, and return where it is."""
        if "hostPath" in volume:
            return str(volume["hostPath"]["path"])
        memory = volume.get("emptyDir", {}).get("medium") == "Memory"
        place = (self.memory if memory else self.folder) / f"{pod}-{volume['name']}"
        place.mkdir()
        secret, config = volume.get("secret", {}), volume.get("configMap", {})
        for key, text in self.files.get(secret.get("secretName") or config.get("name"), {}).items():
            (place / key).write_text(text)
            os.chown(place / key, 0, GROUP)
            (place / key).chmod(secret.get("defaultMode", 0o644))
        os.chown(place, 0, GROUP)
        place.chmod(0o2777)
        return str(place)


def set_up(workload: Spec) -> Iterator[tuple[str, Spec]]:
    """Yield the names and specs of the pods that a workload's controller makes."""
    name = workload["metadata"]["name"]
    if workload["kind"] == "StatefulSet":
        spec = workload["spec"]["template"]["spec"]
        claims = [{"name": claim["metadata"]["name"]} for claim in workload["spec"]["volumeClaimTemplates"]]
        for number in range(workload["spec"]["replicas"]):
            yield f"{name}-{number}", spec | {"volumes": [*spec["volumes"], *claims]}
    if workload["kind"] == "RayCluster":
        yield f"{name}-head", _node(name, workload["spec"]["headGroupSpec"], head=True)
        for group in workload["spec"]["workerGroupSpecs"]:
            for number in range(group["replicas"]):
                yield f"{name}-{group['groupName']}-{number}", _node(name, group, head=False)


def _node(cluster: str, group: Spec, *, head: bool) -> Spec:
    """Do with the pod of a Ray node what KubeRay 1.5 does: its command, environment, and wait for the head."""
    spec: Spec = group["template"]["spec"]
    container, address = spec["containers"][0], f"{cluster}-head-svc:6379"
    limits, labels = container["resources"]["limits"], group["labels"].items()
    parameters = {
        "num-cpus": limits["cpu"],
        "memory": int(limits["memory"].removesuffix("Gi")) << 30,
        **({"dashboard-host": "0.0.0.0"} if head else {"address": address}),
        **{"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365", "block": "true"},
        **group["rayStartParams"],
        "labels": ",".join(f"{key}={value}" for key, value in labels),
    }
    flags = [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in sorted(parameters.items())]
    start = shlex.join(["ray", "start", *["--head"] * head, *flags])
    given = {
        "RAY_ADDRESS": "127.0.0.1:6379" if head else address,
        **{"RAY_PORT": "6379", "RAY_CLUSTER_NAME": cluster, "RAY_CLUSTER_NAMESPACE": "default"},
        **{"KUBERAY_GEN_RAY_START_CMD": start, "RAY_USAGE_STATS_KUBERAY_IN_USE": "1"},
    }
    ray = container | {
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"ulimit -n 65536; {start}"],
        "env": [*container["env"], *({"name": key, "value": value} for key, value in given.items())],
    }
    waiting = container | {
        "name": "wait-gcs-ready",
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"until ray health-check --address {address}; do sleep 5; done"],
        "resources": {"limits": {"memory": "256Mi"}},
    }
    return spec | {"containers": [ray], "initContainers": [] if head else [waiting]}


def ready(name: str, spec: Spec) -> str:
    """Ask what the probes of a pod ask; return what does not answer, or nothing."""
    address = podman("inspect", "--format={{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}", f"{name}-infra")
    for container in spec["containers"]:
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            asked = probe.get("tcpSocket") or probe.get("httpGet")
            if not asked:
                continue
            host, port = address.split()[0], ports.get(asked["port"], asked["port"])
            try:
                if "path" in asked:
                    urlopen(f"http://{host}:{port}{asked['path']}", timeout=5).close()
                else:
                    socket.create_connection((host, port), timeout=5).close()
            except OSError as error:
                return f"{name}: {kind} of {container['name']}: {error}"
    return ""


def podman(*arguments: str) -> str:
    """Run podman and return what it prints; raises RuntimeError with its words."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"podman {shlex.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
