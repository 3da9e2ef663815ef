"""A Kubernetes of a test's own, without nodes: etcd, API server, controllers and scheduler as processes.

Nothing in it runs a container, so it needs neither root nor the development cluster, and whatever is installed into it
(webhooks for every pod, nodes by the hundred) harms nobody. Its programs are the development cluster's.
"""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml
from tests.support import kubectl
from tests.support.ports import free_port
from tests.support.wait import until

KUBERNETES: Final = kubectl.ROOT / ".dev" / "bin" / "kubernetes"
UP_SECONDS: Final = 120.0
DOWN_SECONDS: Final = 20.0
CLIENTS: Final = {
    "admin": "lockstep-admin/system:masters",
    "controller-manager": "system:kube-controller-manager",
    "scheduler": "system:kube-scheduler",
}


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """`folder` holds certificates, kubeconfigs and logs."""

    folder: Path
    url: str

    @property
    def kubeconfig(self) -> Path:
        """Of an administrator."""
        return self.folder / "admin.kubeconfig"

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        return kubectl.kubectl(f"--kubeconfig={self.kubeconfig}", *arguments, stdin=stdin, timeout=timeout)

    def apply(self, *documents: Mapping[str, Any]) -> None:
        text = yaml.safe_dump_all(map(dict, documents), sort_keys=False)
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)

    def get(self, *arguments: str) -> Any:
        return yaml.safe_load(self.kubectl("get", *arguments, "-o", "yaml"))

    @contextmanager
    def running(self, name: str, *command: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """A program of this cluster, which ends with the block. Its log is `folder`/`name`.log."""
        environment = {**os.environ, **variables}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=environment
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(DOWN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self, name: str, end: int = 4000) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-end:]


@contextmanager
def control_plane(folder: Path, more: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Iterator[ControlPlane]:
    """Once it serves, and its controllers and its scheduler run. `more` are further options, by program."""
    plane = ControlPlane(folder, f"https://127.0.0.1:{free_port()}")
    _write_credentials(plane)
    store = f"http://127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        for name, options in {"etcd": _etcd(plane, store), "kube-apiserver": _api_server(plane, store)}.items():
            stack.enter_context(plane.running(name, str(KUBERNETES), name, *options, *more.get(name, ())))
        until("the API server", lambda: _is_up(plane), UP_SECONDS, lambda: plane.log("kube-apiserver"))
        for name, options in {
            "kube-controller-manager": _controllers(plane),
            "kube-scheduler": _scheduler(plane),
        }.items():
            stack.enter_context(plane.running(name, str(KUBERNETES), name, *options, *more.get(name, ())))
        yield plane


def _write_credentials(plane: ControlPlane) -> None:
    clients = [f"{name}={subject}" for name, subject in CLIENTS.items()]
    subprocess.run([str(KUBERNETES), "pki", str(plane.pki), *clients, "server=server@localhost,127.0.0.1"], check=True)
    for client in CLIENTS:
        path = plane.folder / f"{client}.kubeconfig"
        path.touch(0o600)
        path.write_text(yaml.safe_dump(_kubeconfig(plane, client)))


def _kubeconfig(plane: ControlPlane, client: str) -> dict[str, Any]:
    def encoded(name: str) -> str:
        return base64.b64encode((plane.pki / name).read_bytes()).decode()

    user = {"client-certificate-data": encoded(f"{client}.crt"), "client-key-data": encoded(f"{client}.key")}
    cluster = {"server": plane.url, "certificate-authority-data": encoded("ca.crt")}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "own",
        "clusters": [{"name": "own", "cluster": cluster}],
        "contexts": [{"name": "own", "context": {"cluster": "own", "user": client}}],
        "users": [{"name": client, "user": user}],
    }


def _etcd(plane: ControlPlane, url: str) -> list[str]:
    peers = f"http://127.0.0.1:{free_port()}"
    return [
        "--name=own",
        f"--data-dir={plane.folder}/etcd",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=own={peers}",
        "--unsafe-no-fsync",
    ]


def _api_server(plane: ControlPlane, store: str) -> list[str]:
    return [
        "--bind-address=127.0.0.1",
        f"--secure-port={plane.url.rpartition(':')[2]}",
        "--service-cluster-ip-range=10.178.0.0/24",
        f"--etcd-servers={store}",
        f"--client-ca-file={plane.pki}/ca.crt",
        f"--tls-cert-file={plane.pki}/server.crt",
        f"--tls-private-key-file={plane.pki}/server.key",
        f"--service-account-issuer={plane.url}",
        f"--service-account-key-file={plane.pki}/service-accounts.key",
        f"--service-account-signing-key-file={plane.pki}/service-accounts.key",
        "--authorization-mode=RBAC",
        "--endpoint-reconciler-type=none",
        "--profiling=false",
    ]


def _controllers(plane: ControlPlane) -> list[str]:
    return [
        f"--kubeconfig={plane.folder}/controller-manager.kubeconfig",
        f"--service-account-private-key-file={plane.pki}/service-accounts.key",
        f"--root-ca-file={plane.pki}/ca.crt",
        "--use-service-account-credentials=true",
        "--secure-port=0",
        "--leader-elect=false",
    ]


def _scheduler(plane: ControlPlane) -> list[str]:
    return [f"--kubeconfig={plane.folder}/scheduler.kubeconfig", "--secure-port=0", "--leader-elect=false"]


def _is_up(plane: ControlPlane) -> bool:
    """Ready, and with the namespace that it makes for itself."""
    own = f"--kubeconfig={plane.kubeconfig}"
    ready = kubectl.attempt(own, "get", "--raw", "/readyz")
    return ready.stdout == "ok" and "default" in kubectl.attempt(own, "get", "namespaces").stdout
