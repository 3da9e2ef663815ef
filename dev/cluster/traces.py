"""Everything that the cluster leaves on the machine: how each kind of trace is found, and how it is removed.

`down` removes what is found, and `leftovers` lists it, so that the two can't disagree about what "nothing" means.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final

from dev.cluster.layout import (
    CGROUP,
    CNI_NETWORK,
    CONTAINERD_SOCKET,
    DEV,
    INTERFACE,
    KUBECONFIG,
    MODELS,
    NETWORK,
    NFT_TABLES,
    RUN,
)
from dev.cluster.processes import recorded

_CGROUPS: Final = Path("/sys/fs/cgroup")
_CNI_CACHE: Final = Path("/var/lib/cni")  # containerd gives libcni no other place for it
_KUBELET_FIXED: Final = Path("/var/lib/kubelet")  # device plugins' sockets are here, whatever --root-dir says
_POD_LOG_LINKS: Final = Path("/var/log/containers")
_SHIM_SOCKETS: Final = Path("/run/containerd/s")  # wherever containerd's own state is


@dataclass(frozen=True, slots=True)
class Trace:
    """A kind of leftover: `find` names what is there, `remove` takes one such name."""

    kind: str
    find: Callable[[], list[str]]
    remove: Callable[[str], None]


def kinds() -> tuple[Trace, ...]:
    """In the order of removal: who holds something goes before what is held."""
    return (
        Trace("process", processes, kill),
        Trace("mount", mounts, _unmount),
        Trace("interface", interfaces, _delete_interface),
        Trace("nftables table", nft_tables, _delete_table),
        Trace("cgroup", cgroups, _remove_cgroup),
        Trace("file", files, _remove_file),
    )


def find_all() -> list[str]:
    return [f"{trace.kind} {name}" for trace in kinds() for name in trace.find()]


def remove_all(patience: float = 10.0) -> list[str]:
    """Remove every trace, again while something is left (veths end with their namespaces); what stays is returned."""
    deadline = time.monotonic() + patience
    while True:
        for trace in kinds():
            for name in trace.find():
                trace.remove(name)
        left = find_all()
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def processes() -> list[str]:
    """Daemons by their record, containers by their cgroup, shims by the socket that they were started for."""
    own = {daemon.pid for daemon in recorded() if daemon.alive} | container_processes() | set(_shims())
    return [str(pid) for pid in sorted(own) if _is_running(pid)]


def container_processes() -> set[int]:
    found: set[int] = set()
    for folder in _cgroup_tops():
        for listing in folder.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in listing.read_text().split())
    return found


def mounts() -> list[str]:
    """Mounts under .dev, the innermost first, so that each can be unmounted in turn."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [point.encode().decode("unicode_escape") for point in points]
    return [point for point in reversed(inside) if point.startswith(f"{DEV}/")]


def interfaces() -> list[str]:
    """Our own interface, and the pods' veths: they carry an address of the cluster's network."""
    described = json.loads(_output("ip", "-json", "address", "show") or "[]")
    network = ip_network(NETWORK)

    def ours(interface: dict[str, object]) -> bool:
        addresses = [ip_address(each["local"]) for each in interface.get("addr_info", [])]  # type: ignore[attr-defined]
        return interface["ifname"] == INTERFACE or any(address in network for address in addresses)

    return [str(interface["ifname"]) for interface in described if ours(interface)]


def nft_tables() -> list[str]:
    present = set(_output("nft", "list", "tables").splitlines())
    return [f"{family} {name}" for family, name in NFT_TABLES if f"table {family} {name}" in present]


def cgroups() -> list[str]:
    """The cluster's cgroups in every hierarchy, the innermost first."""
    found: list[str] = []
    for top in _cgroup_tops():
        found += [str(folder) for folder, _, _ in os.walk(top, topdown=False)]
    return found


def files() -> list[str]:
    candidates = [RUN, KUBECONFIG, *_cni_results(), *_stale_log_links(), *_dead_sockets()]
    if MODELS.is_symlink():
        candidates.append(MODELS)
    candidates += [folder for folder in _fixed_folders() if folder.is_dir() and not any(folder.iterdir())]
    return [str(path) for path in candidates if path.exists() or path.is_symlink()]


def _fixed_folders() -> list[Path]:
    """Folders that the programs make outside .dev; ours to remove only when empty, for others may use them."""
    plugins = _KUBELET_FIXED / "device-plugins"
    folders = [_CNI_CACHE / "results", _POD_LOG_LINKS, plugins, _SHIM_SOCKETS]
    return [*folders, MODELS.parent, *(folder.parent for folder in folders if folder != _POD_LOG_LINKS)]


def _cni_results() -> Iterator[Path]:
    """libcni's notes on our pods: by the network's name or, for loopback, by the namespace's path within .dev."""
    for note in _CNI_CACHE.glob("results/*"):
        with contextlib.suppress(OSError):
            if note.name.startswith(f"{CNI_NETWORK}-") or f"{RUN}/" in note.read_text():
                yield note


def _dead_sockets() -> Iterator[Path]:
    """Sockets of kubelet and shims on which nobody listens any more, so they are nobody's."""
    for path in [*_KUBELET_FIXED.glob("device-plugins/*.sock"), *_SHIM_SOCKETS.glob("*")]:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except ConnectionRefusedError:
                yield path
            except OSError:
                continue


def _stale_log_links() -> Iterator[Path]:
    for link in _POD_LOG_LINKS.glob("*.log"):
        if link.is_symlink() and str(link.readlink()).startswith(f"{DEV}/"):
            yield link


def _cgroup_tops() -> list[Path]:
    return [folder for folder in (_CGROUPS / CGROUP, *_CGROUPS.glob(f"*/{CGROUP}")) if folder.is_dir()]


def _shims() -> Iterator[int]:
    address = str(CONTAINERD_SOCKET).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if b"containerd-shim" in arguments[0] and address in arguments:
                yield int(folder.name)


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill(pid: int | str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)


def _unmount(point: str) -> None:
    subprocess.run(["umount", "--lazy", point], capture_output=True)


def _delete_interface(name: str) -> None:
    subprocess.run(["ip", "link", "delete", name], capture_output=True)


def _delete_table(table: str) -> None:
    subprocess.run(["nft", "delete", "table", *table.split()], capture_output=True)


def _remove_cgroup(folder: str) -> None:
    with contextlib.suppress(OSError):  # busy while a killed process is being reaped: tried again
        Path(folder).rmdir()


def _remove_file(name: str) -> None:
    path = Path(name)
    if path == RUN:
        if not mounts():  # never delete through a mount: behind it may be a user's model
            shutil.rmtree(path, ignore_errors=True)
    elif path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout
