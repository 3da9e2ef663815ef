"""The cluster of bench.scale, and the programs that are measured on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from tests.support import chart
from tests.support.cluster_api import ClusterApi
from tests.support.control_plane import ControlPlane, control_plane
from tests.support.http import HTTP
from tests.support.kwok import fake_nodes
from tests.support.ports import free_port

Object = dict[str, Any]

POD_NETWORK: Final = "10.179.0.0/16"
NODES: Final = 50
LABEL: Final = "scale"
ACCOUNT: Final = "system:serviceaccount:lockstep-system:lockstep"
PEERS_ACCOUNT: Final = "system:serviceaccount:lws-system:lws-controller-manager"
FAST: Final = ("--kube-api-qps=500", "--kube-api-burst=1000")
MORE: Final = {
    "kube-controller-manager": (*FAST, "--concurrent-statefulset-syncs=20", "--concurrent-service-endpoint-syncs=10"),
    "kube-scheduler": FAST,
}


class Scene:
    """A cluster with fake nodes. What an earlier one has left in the folder is there again."""

    def __init__(self, folder: Path, stack: ExitStack, models: int) -> None:
        self.folder, self.models = folder, models
        stack.enter_context(local_addresses(POD_NETWORK))
        self.plane = stack.enter_context(control_plane(folder, {**MORE, "kube-apiserver": _audited(folder)}))
        self.api = ClusterApi(self.plane.kubeconfig)
        first = POD_NETWORK.replace("0.0/", "0.1/")
        fake = fake_nodes(self.api, folder, first, self.plane.kubeconfig, tidy=False, label=LABEL)
        self.nodes = stack.enter_context(fake)
        self.nodes.add(NODES)
        self._install()
        self._leaders_port = free_port()

    @contextmanager
    def leaders(self) -> Iterator[None]:
        """The fake supervisors, meanwhile."""
        command = ["-m", "tests.support.fake_leaders", str(self.plane.kubeconfig), str(self._leaders_port)]
        with self.plane.running("leaders", sys.executable, *command, PYTHONPATH=str(chart.ROOT)):
            yield

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

    def requests(self, account: str, since: float) -> Iterator[Object]:
        """Of the audit log; unix seconds."""
        with (self.folder / "audit.log").open() as log:
            for entry in map(json.loads, log):
                if entry["user"]["username"] == account and when(entry) >= since:
                    yield entry

    def asked(self, account: str, since: float) -> Counter[str]:
        """How often, by verb and kind."""
        asked = Counter(map(meaning, self.requests(account, since)))
        print(asked.most_common(8), flush=True)
        return asked

    def explain(self) -> str:
        logs = [name for name in ("leaders", "operator", "lws") if (self.folder / f"{name}.log").exists()]
        return "\n".join(self.plane.log(name, 1500) for name in logs)


class Program:
    """One that acts on the cluster as a ServiceAccount of it."""

    def __init__(self, plane: ControlPlane, name: str, account: str) -> None:
        """`account` as the API server has it in its audit log."""
        self.plane, self.name, self.account = plane, name, account
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        namespace, _, account_name = account.removeprefix("system:serviceaccount:").partition(":")
        self._token = plane.kubectl("-n", namespace, "create", "token", account_name, "--duration=24h").strip()
        config = yaml.safe_load(plane.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": self._token}
        self._kubeconfig = plane.folder / f"{name}.kubeconfig"
        self._kubeconfig.touch(0o600)
        self._kubeconfig.write_text(yaml.safe_dump(config))

    def run(self, *command: str, **variables: str) -> None:
        self._process = self._stack.enter_context(self.plane.running(self.name, *command, **variables))

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        self._stack.close()
        self._stack = ExitStack()

    def mebibytes(self, name: str) -> float:
        """VmRSS or VmHWM."""
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Operator(Program):
    """With the rights that the chart gives it."""

    def __init__(self, plane: ControlPlane) -> None:
        super().__init__(plane, "operator", ACCOUNT)
        self._port = free_port()

    def start(self) -> None:
        profiler = os.environ.get("LOCKSTEP_BENCH_PROFILER", "").split()  # as: -m cProfile -o build/operator.prof
        self.run(
            sys.executable, *profiler, "-m", "lockstep_operator",
            KUBECONFIG=str(self._kubeconfig), LOCKSTEP_PORT=str(self._port), LOCKSTEP_LIVE_PAGE="Off",
            LOCKSTEP_RUNTIME_IMAGE="runtime:1", LOCKSTEP_OPERATOR_NAMESPACE="lockstep-system",
            LOCKSTEP_LEASE="lockstep", LOCKSTEP_KEY_SECRET="lockstep-key", POD_ID="operator-1",
        )  # fmt: skip

    def ready(self) -> int:
        """Models, by the operator's own metric; 0 while there is none. An operator that has ended, as it does when it
        can't renew its Lease in time, is started again, as a kubelet would."""
        if not self.runs:
            print("the operator has ended:", self.plane.log(self.name, 300), flush=True)
            self.start()
        try:
            text = HTTP.get(f"http://127.0.0.1:{self._port}/metrics", timeout=20).text
        except httpx.TransportError:
            return 0
        found = re.search(r'^lockstep_operator_models\{state="Ready"\} (\S+)$', text, re.MULTILINE)
        return int(float(found[1])) if found else 0


def meaning(entry: Object) -> str:
    """Verb and kind; of what is no object, its path."""
    what = entry.get("objectRef", {}).get("resource") or entry["requestURI"].partition("?")[0]
    return f"{entry['verb']} {what}"


def when(entry: Object) -> float:
    return datetime.fromisoformat(entry["requestReceivedTimestamp"]).timestamp()


def _audited(folder: Path) -> list[str]:
    policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
              "rules": [{"level": "Metadata", "users": [ACCOUNT, PEERS_ACCOUNT]}, {"level": "None"}]}  # fmt: skip
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
    subprocess.run(["ip", "route", "replace", *route], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "route", "del", *route], check=False)
