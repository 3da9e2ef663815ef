"""What control groups of either version grant, read from the files that real systems have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import memory_cgroup

from lockstep_runtime.host import cgroup, memory
from lockstep_runtime.host.cgroup import MemoryUse
from lockstep_runtime.supervisor.oom import OutOfMemory, sentence
from lockstep_runtime.worker.memory import cpu_budget

MIB = 2**20
NO_LIMIT = "9223372036854771712"  # what version 1 writes
MEMINFO = "MemTotal:       24684084 kB\nMemFree:         9862044 kB\nMemAvailable:   21846620 kB\n"
V2_MOUNT = "29 23 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw\n"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in ({"proc/meminfo": MEMINFO} | dict(files)).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, **files: str) -> dict[str, str]:
    return {f"{folder}/{name.replace('__', '.')}": text for name, text in files.items()}


def v2_memory(folder: str, limit: str, current: int, inactive: int = 0, kills: int = 0) -> dict[str, str]:
    stat = f"anon {current - inactive}\nfile {inactive}\nshmem 0\ninactive_file {inactive}\nactive_file 0\n"
    events = f"low 0\nhigh 0\nmax 12\noom {kills}\noom_kill {kills}\noom_group_kill 0\n"
    return group(
        folder, memory__max=f"{limit}\n", memory__current=f"{current}\n", memory__stat=stat, memory__events=events
    )


def v1_memory(folder: str, limit: str, usage: int, hierarchical: str = NO_LIMIT, kills: int = 0) -> dict[str, str]:
    stat = (
        f"cache {usage // 2}\nrss {usage // 2}\ninactive_file 1048576\nhierarchical_memory_limit {hierarchical}\n"
        "total_cache 6268612608\ntotal_inactive_file 2097152\n"
    )
    control = f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"
    return group(
        folder,
        memory__limit_in_bytes=f"{limit}\n",
        memory__usage_in_bytes=f"{usage}\n",
        memory__stat=stat,
        memory__oom_control=control,
    )


def room_is_exact(root: Path) -> bool:
    use = cgroup.memory_use(root)
    assert use is not None
    return cgroup.has_memory(use.available, root) and not cgroup.has_memory(use.available + 1, root)


def test_version_2_in_a_container_with_a_namespace_of_its_own(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT}
        | v2_memory("sys/fs/cgroup", str(350 * MIB), 300 * MIB, 40 * MIB, kills=3)
        | group("sys/fs/cgroup", cpu__max="150000 100000\n", memory__peak=f"{349 * MIB}\n"),
    )
    assert cgroup.memory_use(root) == MemoryUse(350 * MIB, 300 * MIB, 40 * MIB)
    assert room_is_exact(root)
    assert memory.available_bytes(root) == 90 * MIB
    assert memory.total_bytes(root) == 350 * MIB
    assert memory.has_room(Path("/dev/shm"), 90 * MIB, root)
    assert not memory.has_room(Path("/dev/shm"), 91 * MIB, root)
    assert cgroup.cpu_quota(root) == 1.5
    assert cgroup.out_of_memory_kills(root) == 3
    assert cgroup.most_used(root) == 349 * MIB


def test_version_2_below_a_pod_whose_limit_is_less(tmp_path: Path) -> None:
    pod = "sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": f"0::/{pod.removeprefix('sys/fs/cgroup/')}/cri-containerd-a.scope\n",
            "proc/self/mountinfo": V2_MOUNT,
        }
        | v2_memory(f"{pod}/cri-containerd-a.scope", "max", 100 * MIB, kills=1)
        | v2_memory(pod, str(512 * MIB), 500 * MIB, 10 * MIB, kills=7)
        | group(f"{pod}/cri-containerd-a.scope", cpu__max="max 100000\n")
        | group(pod, cpu__max="400000 100000\n")
        | group("sys/fs/cgroup/kubepods.slice", cpu__max="200000 100000\n", memory__max="max\n"),
    )
    assert cgroup.memory_use(root) == MemoryUse(512 * MIB, 500 * MIB, 10 * MIB)
    assert room_is_exact(root)
    assert cgroup.cpu_quota(root) == 2.0
    assert cgroup.out_of_memory_kills(root) == 1  # our own group's


def test_version_2_where_our_group_has_no_controller_of_its_own(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {"proc/self/cgroup": "0::/user.slice/app.scope\n", "proc/self/mountinfo": V2_MOUNT}
        | group("sys/fs/cgroup/user.slice/app.scope", cgroup__procs="1\n")
        | v2_memory("sys/fs/cgroup/user.slice", str(2**30), 2**29, kills=2),
    )
    assert cgroup.memory_use(root) == MemoryUse(2**30, 2**29, 0)
    assert room_is_exact(root)
    assert cgroup.out_of_memory_kills(root) == 2


V1_MOUNTS = (
    "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
V1_GROUPS = "9:name=systemd:{path}\n4:memory:{path}\n3:cpuset:/\n1:cpu,cpuacct:{path}\n0::/\n"


def test_version_1_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    """Docker's way: the mount's top is the container's group."""
    path = "/docker/0123abc"
    root = tree(
        tmp_path,
        {"proc/self/cgroup": V1_GROUPS.format(path=path), "proc/self/mountinfo": V1_MOUNTS.format(top=path)}
        | v1_memory("sys/fs/cgroup/memory", str(350 * MIB), 349 * MIB, kills=5)
        | group("sys/fs/cgroup/cpu,cpuacct", cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n"),
    )
    assert cgroup.memory_use(root) == MemoryUse(350 * MIB, 349 * MIB, 2 * MIB)
    assert room_is_exact(root)
    assert cgroup.cpu_quota(root) == 2.5
    assert cgroup.out_of_memory_kills(root) == 5


def test_version_1_nested_and_beside_version_2(tmp_path: Path) -> None:
    """A hybrid system: version 2 is mounted too, but has no memory."""
    path = "/kubepods/burstable/pod1/a"
    base = "sys/fs/cgroup/memory/kubepods/burstable/pod1"
    root = tree(
        tmp_path,
        {"proc/self/cgroup": V1_GROUPS.format(path=path), "proc/self/mountinfo": V1_MOUNTS.format(top="/")}
        | v1_memory(f"{base}/a", NO_LIMIT, 50 * MIB, kills=1)
        | v1_memory(base, str(100 * MIB), 90 * MIB, kills=9)
        | v1_memory("sys/fs/cgroup/memory", NO_LIMIT, 2**33)
        | group("sys/fs/cgroup/cpu,cpuacct/kubepods", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
        | group("sys/fs/cgroup/unified", cgroup__controllers="hugetlb\n"),
    )
    assert cgroup.memory_use(root) == MemoryUse(100 * MIB, 90 * MIB, 2 * MIB)
    assert room_is_exact(root)
    assert cgroup.cpu_quota(root) is None
    assert cgroup.out_of_memory_kills(root) == 1


def test_version_1_tells_of_limits_above_what_can_be_seen(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {"proc/self/cgroup": V1_GROUPS.format(path="/"), "proc/self/mountinfo": V1_MOUNTS.format(top="/")}
        | v1_memory("sys/fs/cgroup/memory", NO_LIMIT, 50 * MIB, hierarchical=str(200 * MIB)),
    )
    assert cgroup.memory_use(root) == MemoryUse(200 * MIB, 50 * MIB, 2 * MIB)
    assert room_is_exact(root)


@pytest.mark.parametrize("path", ["/somewhere/else", "/../../kubepods/x", "/docker/0123abcdef"])
def test_a_group_outside_of_what_is_mounted_is_what_is_mounted(tmp_path: Path, path: str) -> None:
    root = tree(
        tmp_path,
        {"proc/self/cgroup": V1_GROUPS.format(path=path), "proc/self/mountinfo": V1_MOUNTS.format(top="/docker/0123")}
        | v1_memory("sys/fs/cgroup/memory", str(64 * MIB), 32 * MIB),
    )
    use = cgroup.memory_use(root)
    assert use is not None
    assert use.limit == 64 * MIB


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "", "proc/self/mountinfo": ""},
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT},  # a machine's own root has no limits
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT}
        | v2_memory("sys/fs/cgroup", "max", 5)
        | group("sys/fs/cgroup", cpu__max="max 100000\n"),
        {"proc/self/cgroup": "nonsense\n", "proc/self/mountinfo": "- - -\n\n1 2 3 - cgroup2\n"},
        {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT}
        | group("sys/fs/cgroup", memory__max="", cpu__max="\n", memory__current="x", memory__stat="inactive_file\n"),
        {"proc/self/cgroup": V1_GROUPS.format(path="/"), "proc/self/mountinfo": V1_MOUNTS.format(top="/")}
        | group("sys/fs/cgroup/cpu,cpuacct", cpu__cfs_quota_us="100000\n", cpu__cfs_period_us="0\n"),
    ],
)
def test_without_limits_the_machine_is_all_there_is(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files)
    assert cgroup.memory_use(root) is None
    assert cgroup.cpu_quota(root) is None
    assert cgroup.out_of_memory_kills(root) == 0
    assert cgroup.most_used(root) is None
    assert memory.available_bytes(root) == 21846620 * 1024
    assert cgroup.has_memory(1 << 50, root)
    assert memory.total_bytes(root) == 24684084 * 1024


@settings(max_examples=25)
@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=60))
def test_no_text_in_these_files_is_an_error(tmp_path_factory: pytest.TempPathFactory, a: str, b: str, c: str) -> None:
    root = tree(
        tmp_path_factory.mktemp("cgroup"),
        {"proc/self/cgroup": a + "\n0::/\n", "proc/self/mountinfo": b + "\n" + V2_MOUNT}
        | group("sys/fs/cgroup", memory__max=c, memory__current=c, memory__stat=c, cpu__max=c, memory__events=c),
    )
    cgroup.memory_use(root)
    cgroup.cpu_quota(root)
    cgroup.out_of_memory_kills(root)


@pytest.mark.parametrize(("quota", "found"), [("50000 100000", 0.5), ("max 100000", None), ("99900000 100000", None)])
def test_cpus_are_those_that_may_be_used(tmp_path: Path, quota: str, found: float | None) -> None:
    """`found` None: those that the process may run on."""
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT} | group("sys/fs/cgroup", cpu__max=quota)
    assert cgroup.cpus(tree(tmp_path, files)) == (found or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("available", "total", "used", "sharers", "found"),
    [
        (1000, 8000, 100, 1, 500),  # half of what is left
        (1000, 8000, 100, 2, 250),
        (7000, 8000, 1000, 2, 1500),  # the other rank has not loaded yet: half of this one's part
        (7000, 8000, 4500, 2, 0),
    ],
)
def test_a_rank_offers_a_share_of_what_the_container_has(
    available: int, total: int, used: int, sharers: int, found: int
) -> None:
    assert cpu_budget(available, total, used, sharers, step=0) == found


def test_a_cgroups_kills_are_told_once_each(tmp_path: Path) -> None:
    def kills(count: int) -> None:
        tree(tmp_path, v2_memory("sys/fs/cgroup", str(350 * MIB), 60 * MIB, kills=count))

    tree(tmp_path, {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT})
    kills(4)
    watch = OutOfMemory(tmp_path)
    assert watch.explain(9) == ""  # a SIGKILL of somebody else's
    kills(6)
    assert watch.explain(15) == ""
    assert watch.explain(None) == ""
    told = "killed by the kernel: out of memory (limit 350 MiB, used 350 MiB; 212 MiB of this process were resident)"
    assert watch.explain(9, 212 * MIB) == told
    assert watch.explain(9).startswith("killed by the kernel")
    assert watch.explain(9) == ""


def test_a_machine_without_memory_is_told_apart_from_a_full_container() -> None:
    use = MemoryUse(350 * MIB, 100 * MIB, 0)
    machine = "killed by the kernel: out of memory (the machine has 4096 MiB, and none was left)"
    assert sentence(use, 120 * MIB, 4096 * MIB, 0) == machine
    assert sentence(None, None, 4096 * MIB, 0) == machine
    assert sentence(use, None, 4096 * MIB, 0) == "killed by the kernel: out of memory (limit 350 MiB, used 350 MiB)"


@pytest.mark.skipif(bool(memory_cgroup.why_not()), reason=memory_cgroup.why_not())
def test_a_real_group_is_read_as_it_is() -> None:
    program = (
        "from lockstep_runtime.host import cgroup, memory\n"
        "use = cgroup.memory_use()\nprint(use.limit, memory.total_bytes(), memory.available_bytes() <= use.limit)"
    )
    with memory_cgroup.memory_group(350 * MIB) as found:
        told = subprocess.run(
            [*found.before, sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
    assert told.stdout.split() == [str(350 * MIB), str(350 * MIB), "True"]
