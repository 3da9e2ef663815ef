"""The operator with thousands of models, on a real API server with fake nodes: `python -m bench.scale [--models N]`.

Etcd, API server, controllers and scheduler run as processes of this machine; kwok answers for nodes and pods, and
`tests.support.fake_leaders` for the supervisors of the groups' first pods. The operator has the rights that the chart
gives it. Requests are counted, and reactions timed, by the API server's audit log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, Final

import httpx
import yaml
from bench.report import Row, report
from bench.scale_models import apply_many, model
from tests.support import chart
from tests.support.cluster_api import ClusterApi
from tests.support.control_plane import ControlPlane, control_plane
from tests.support.http import HTTP
from tests.support.kwok import fake_nodes
from tests.support.ports import free_port
from tests.support.wait import until

Object = dict[str, Any]

POD_NETWORK: Final = "10.179.0.0/16"
NODES: Final = 50
ACCOUNT: Final = "system:serviceaccount:lockstep-system:lockstep"
FAST: Final = ("--kube-api-qps=500", "--kube-api-burst=1000")
MORE: Final = {
    "kube-controller-manager": (*FAST, "--concurrent-statefulset-syncs=20", "--concurrent-service-endpoint-syncs=10"),
    "kube-scheduler": FAST,
}
MADE_SECONDS: Final = 1800.0
STARTED_SECONDS: Final = 600.0
SETTLED_SECONDS: Final = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.scale")
    parser.add_argument("--models", type=int, default=2000, help="of one group of four pods each")
    parser.add_argument("--rest-seconds", type=float, default=600, help="for how long requests at rest are counted")
    parser.add_argument("--faults", type=int, default=200, help="groups that are poisoned, two a second")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockstep-scale-") as folder, ExitStack() as stack:
        scene = Scene(Path(folder), stack, options.models)
        rows = measured(scene, options)
    report("scale", rows)


class Scene:
    """A cluster with nodes and namespaces, in which nobody has made anything yet."""

    def __init__(self, folder: Path, stack: ExitStack, models: int) -> None:
        self.folder, self.models = folder, models
        stack.enter_context(local_addresses(POD_NETWORK))
        self.plane = stack.enter_context(control_plane(folder, {**MORE, "kube-apiserver": _audited(folder)}))
        self.api = ClusterApi(self.plane.kubeconfig)
        first = POD_NETWORK.replace("0.0/", "0.1/")
        self.nodes = stack.enter_context(fake_nodes(self.api, folder, first, self.plane.kubeconfig, tidy=False))
        self.nodes.add(NODES)
        self._install()
        self._leaders_port = free_port()
        leaders = ["-m", "tests.support.fake_leaders", str(self.plane.kubeconfig), str(self._leaders_port)]
        path = f"PYTHONPATH={chart.ROOT}"
        stack.enter_context(self.plane.running("leaders", "env", path, sys.executable, *leaders))
        self.operator = Operator(self.plane)
        stack.callback(self.operator.stop)

    def groups_well(self) -> int:
        return int(HTTP.get(f"http://127.0.0.1:{self._leaders_port}/").text)

    def poison(self, name: str) -> float:
        url = f"http://127.0.0.1:{self._leaders_port}/poison"
        return float(HTTP.post(url, params={"group": name}).text)

    def _install(self) -> None:
        """What the chart installs, but for the Deployment."""
        roles = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
        kinds = ("ServiceAccount", *roles, "CustomResourceDefinition")
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "lockstep-system"}}
        self.plane.apply(namespace)
        self.plane.apply(*(one for one in chart.render() if one["kind"] in kinds))
        self.plane.kubectl("wait", "--for=condition=Established", "crd/tensorparallelmodels.lockstep.dev")

    def requests(self, since: float) -> Iterator[Object]:
        """The operator's, of the audit log; unix seconds."""
        with (self.folder / "audit.log").open() as log:
            yield from (entry for entry in map(json.loads, log) if when(entry) >= since)

    def asked(self, since: float) -> Counter[str]:
        """How often, by verb and kind."""
        asked = Counter(map(meaning, self.requests(since)))
        print(asked.most_common(8), flush=True)
        return asked

    def explain(self) -> str:
        return "\n".join(self.plane.log(name) for name in ("leaders", "operator"))


class Operator:
    """The program, as the ServiceAccount that the chart gives it."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane, self._port = plane, free_port()
        token = plane.kubectl("-n", "lockstep-system", "create", "token", "lockstep", "--duration=24h").strip()
        config = yaml.safe_load(plane.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token}
        self._kubeconfig = plane.folder / "operator.kubeconfig"
        self._kubeconfig.touch(0o600)
        self._kubeconfig.write_text(yaml.safe_dump(config))
        self._stack = ExitStack()
        self.pid = 0

    def start(self) -> None:
        environment = {
            "KUBECONFIG": str(self._kubeconfig), "LOCKSTEP_PORT": str(self._port), "LOCKSTEP_LIVE_PAGE": "Local",
            "LOCKSTEP_RUNTIME_IMAGE": "runtime:1", "LOCKSTEP_OPERATOR_NAMESPACE": "lockstep-system",
            "LOCKSTEP_LEASE": "lockstep", "POD_ID": "operator-1",
        }  # fmt: skip
        with_environment = ["env", *(f"{name}={value}" for name, value in environment.items())]
        profiler = os.environ.get("LOCKSTEP_BENCH_PROFILER", "").split()  # as: -m cProfile -o build/operator.prof
        command = [*with_environment, sys.executable, *profiler, "-m", "lockstep_operator"]
        self.pid = self._stack.enter_context(self._plane.running("operator", *command)).pid

    def stop(self) -> None:
        self._stack.close()
        self._stack = ExitStack()

    def metric(self, name: str) -> float:
        """0 while there is none."""
        try:
            text = HTTP.get(f"http://127.0.0.1:{self._port}/metrics", timeout=20).text
        except httpx.TransportError:
            return 0.0
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def mebibytes(self, name: str) -> float:
        """VmRSS or VmHWM."""
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def all_ready(self, models: int) -> bool:
        return self.metric('lockstep_operator_models{state="Ready"}') >= models


class Findings:
    """Shown as they come."""

    def __init__(self, case: str) -> None:
        self._case = case
        self.rows: list[Row] = []

    def add(self, metric: str, value: float, unit: str = "") -> None:
        self.rows.append(Row(case=self._case, metric=metric, value=value, unit=unit))
        print(f"{metric}: {value:.4g} {unit}", flush=True)


def measured(scene: Scene, options: argparse.Namespace) -> list[Row]:
    found = Findings(f"{scene.models} models, {4 * scene.models} pods")
    made(scene, found)
    restarted(scene, found)
    at_rest(scene, found, options.rest_seconds)
    delays = sorted(reactions(scene, options.faults))
    found.add("a fault report to its action, median", delays[len(delays) // 2], "s")
    found.add("a fault report to its action, p99", delays[int(len(delays) * 0.99)], "s")
    found.add("peak memory", scene.operator.mebibytes("VmHWM"), "MiB")
    return found.rows


def made(scene: Scene, found: Findings) -> None:
    """All models at once, on an empty cluster."""
    began, wanted = time.time(), scene.models
    scene.operator.start()
    apply_many(scene.plane, (model(number, scene.nodes.placement) for number in range(wanted)))
    until("all models to be Ready", lambda: scene.operator.all_ready(wanted), MADE_SECONDS, scene.explain)
    until("all groups to be well", lambda: scene.groups_well() >= wanted, STARTED_SECONDS, scene.explain)
    found.add("from nothing to all Ready", time.time() - began, "s")
    found.add("requests for each, until then", scene.asked(began).total() / wanted)


def restarted(scene: Scene, found: Findings) -> None:
    scene.operator.stop()
    began = time.time()
    scene.operator.start()
    until("all to be reconciled", lambda: scene.operator.all_ready(scene.models), STARTED_SECONDS, scene.explain)
    found.add("restart to all reconciled", time.time() - began, "s")
    found.add("requests for each, until then", scene.asked(began).total() / scene.models)
    found.add("peak memory of the start", scene.operator.mebibytes("VmHWM"), "MiB")


def at_rest(scene: Scene, found: Findings, seconds: float) -> None:
    """Each model's token is read every 20 minutes besides, which a shorter time need not show."""
    time.sleep(SETTLED_SECONDS)
    began, cpu = time.time(), scene.operator.cpu_seconds()
    time.sleep(seconds)
    asked = scene.asked(began)
    of_models = sum(count for what, count in asked.items() if not what.endswith(" leases"))
    found.add("requests at rest per model and 10 minutes", of_models / scene.models * 600 / seconds)
    found.add("requests of the Lease per second", (asked.total() - of_models) / seconds)
    found.add("CPU at rest", (scene.operator.cpu_seconds() - cpu) / seconds * 100, "% of a core")
    found.add("memory at rest", scene.operator.mebibytes("VmRSS"), "MiB")


def reactions(scene: Scene, faults: int) -> list[float]:
    """Seconds from a group's word that it is poisoned to the deletion of its suspect's pod."""
    chosen = Random(0).sample(range(scene.models), min(faults, scene.models))
    began, reported = time.time(), dict[str, float]()
    for number in chosen:
        reported[f"bench-{number % 20}/m{number}-0-1"] = scene.poison(f"bench-{number % 20}/m{number}/0")
        time.sleep(0.5)
    deleted = dict[str, float]()

    def all_deleted() -> bool:
        for entry in scene.requests(began):
            if entry["verb"] == "delete" and entry["objectRef"]["resource"] == "pods":
                reference = entry["objectRef"]
                deleted.setdefault(f"{reference['namespace']}/{reference['name']}", when(entry))
        return reported.keys() <= deleted.keys()

    until("an action for each", all_deleted, STARTED_SECONDS, scene.explain)
    return [deleted[pod] - at for pod, at in reported.items()]


def meaning(entry: Object) -> str:
    """Verb and kind; of what is no object, its path."""
    what = entry.get("objectRef", {}).get("resource") or entry["requestURI"].partition("?")[0]
    return f"{entry['verb']} {what}"


def when(entry: Object) -> float:
    return datetime.fromisoformat(entry["requestReceivedTimestamp"]).timestamp()


def _audited(folder: Path) -> list[str]:
    policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
              "rules": [{"level": "Metadata", "users": [ACCOUNT]}, {"level": "None"}]}  # fmt: skip
    (folder / "audit.yaml").write_text(yaml.safe_dump(policy))
    fast = ["--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000"]
    return [
        f"--audit-policy-file={folder}/audit.yaml",
        f"--audit-log-path={folder}/audit.log",
        "--audit-log-maxsize=2000",
        *fast,
    ]


@contextmanager
def local_addresses(network: str) -> Iterator[None]:
    """All addresses of the network are this machine's meanwhile. Needs root."""
    route = ["local", network, "dev", "lo"]
    subprocess.run(["ip", "route", "add", *route], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "route", "del", *route], check=False)


if __name__ == "__main__":
    main()
