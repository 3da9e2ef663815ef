"""Bring the cluster up, take it down, and say how it is."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dev.cluster import components, containers, host, network, pause, processes, settings, toolchain, traces
from dev.cluster.layout import (
    CGROUP,
    CONTAINERD_ROOT,
    DEV,
    EXAMPLES,
    KUBECONFIG,
    KUBERNETES,
    LOGS,
    MODELS,
    NODE_NAME,
    RUN,
)
from dev.cluster.progress import Failure, say

_PATIENCE: Final = 60.0


def up() -> None:
    """From whatever state to a Ready node; nothing but a look when there is one already."""
    host.check()
    host.install_packages()
    toolchain.ensure()
    if is_up():
        say("the cluster is up")
        return
    down()
    if route := network.foreign_route():
        raise Failure(f"The cluster's network is taken: there is a route to {route}.")
    shutil.rmtree(LOGS, ignore_errors=True)
    RUN.mkdir(parents=True, exist_ok=True)
    network.set_up()
    _make_cgroups()
    _link_models()
    subprocess.run(components.certificates(), check=True)
    settings.write()
    say("starting containerd, etcd and the API server")
    _start(components.foundation())
    _wait("the API server", lambda: _kubectl("get", "--raw", "/readyz") == "ok", "kube-apiserver")
    say("the API server is ready; starting the controllers, the kubelet, kube-proxy and CoreDNS")
    pause.load()
    _apply_addons()
    _start(components.control_and_node())
    _wait("the node", node_is_ready, "kubelet")
    _wait(
        "the default ServiceAccount",
        lambda: bool(_kubectl("get", "serviceaccount", "default")),
        "kube-controller-manager",
    )
    say(f"node {NODE_NAME} is Ready; export KUBECONFIG={KUBECONFIG}")


def down() -> None:
    """Stop everything and leave nothing behind but .dev's binaries, images, caches and logs."""
    daemons = {daemon.name: daemon for daemon in processes.recorded()}
    containerd = daemons.pop("containerd", None)
    processes.stop(daemons.values(), patience=1)
    if containerd and containerd.alive:
        for pid in traces.container_processes():
            traces.kill(pid)
        with contextlib.suppress(Failure):
            containers.remove_all()
        processes.stop([containerd], patience=5)
    network.restore_forwarding()
    for folder in CONTAINERD_ROOT.glob("io.containerd.grpc.v1.cri/*"):
        shutil.rmtree(folder, ignore_errors=True)
    if left := traces.remove_all():
        raise Failure("Could not remove: " + "; ".join(left))


def purge() -> None:
    """`down`, and then all of .dev: images, binaries, Go, caches."""
    down()
    shutil.rmtree(DEV)


def is_up() -> bool:
    daemons = processes.recorded()
    return bool(daemons) and all(daemon.alive for daemon in daemons) and KUBECONFIG.exists() and node_is_ready()


def status() -> str:
    """One line per daemon, then what kubectl says of the node."""
    daemons = processes.recorded()
    if not daemons:
        return "The cluster is down."
    lines = [f"{daemon.name:26}{'running' if daemon.alive else 'ENDED: see .dev/logs'}" for daemon in daemons]
    return "\n".join([*lines, "", _kubectl("get", "nodes", "--output", "wide") or "The API server doesn't answer."])


def node_is_ready() -> bool:
    path = '{.status.conditions[?(@.type=="Ready")].status}'
    return _kubectl("get", "node", NODE_NAME, "--output", f"jsonpath={path}") == "True"


def _start(commands: dict[str, list[str]]) -> None:
    for name, command in commands.items():
        processes.start(name, command)


def _wait(what: str, ready: Callable[[], bool], culprit: str) -> None:
    """Until `ready`; fail when a daemon has ended, or after a minute, with its last words."""
    deadline = time.monotonic() + _PATIENCE
    while not ready():
        ended = [daemon.name for daemon in processes.recorded() if not daemon.alive]
        if ended:
            raise Failure(f"{ended[0]} ended. The end of {LOGS}/{ended[0]}.log:\n{processes.last_words(ended[0])}")
        if time.monotonic() > deadline:
            raise Failure(
                f"{what} was not ready after {_PATIENCE:.0f} s. {LOGS}/{culprit}.log:\n{processes.last_words(culprit)}"
            )
        time.sleep(0.1)


def _kubectl(*arguments: str) -> str:
    """kubectl's output, or nothing when it failed."""
    command = [str(KUBERNETES), "kubectl", f"--kubeconfig={KUBECONFIG}", "--request-timeout=5s", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def _apply_addons() -> None:
    arguments = ("apply", "--server-side", "--filename", str(RUN / "addons.yaml"))
    _wait("the cluster's own manifest", lambda: bool(_kubectl(*arguments)), "kube-apiserver")


def _make_cgroups() -> None:
    """The kubelet wants its root cgroup to exist, in every hierarchy of version 1 or with all controllers of 2."""
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():
        for name in (top / "cgroup.controllers").read_text().split():
            with contextlib.suppress(
                OSError
            ):  # some can't be delegated here; the kubelet says which of its own it lacks
                (top / "cgroup.subtree_control").write_text(f"+{name}")
        (top / CGROUP).mkdir(exist_ok=True)
        return
    for hierarchy in top.iterdir():
        if (hierarchy / "cgroup.procs").exists() and not hierarchy.is_symlink():
            (hierarchy / CGROUP).mkdir(exist_ok=True)


def _link_models() -> None:
    MODELS.parent.mkdir(parents=True, exist_ok=True)
    MODELS.symlink_to(EXAMPLES)
