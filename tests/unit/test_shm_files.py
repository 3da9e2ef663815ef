"""Files of a supervisor in memory that containers may share: which are left alone, and which are removed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep_runtime.host import shm_files
from lockstep_runtime.host.shm_files import FOLDER_VARIABLE, UNCLAIMED_SECONDS, claim, owner_of, remove

OTHER = "ns4026530000"  # a pid namespace that is not ours
HOLDER = """
import os, sys
from lockstep_runtime.host import shm_files
held = shm_files.claim(os.environ)
me = shm_files.owner_of(os.getpid())
open(f"{sys.argv[1]}/lockstep-weights-{me}-0", "w").close()
print("ready", flush=True)
sys.stdin.read()
"""
REMOVER = "import os\nfrom lockstep_runtime.host import shm_files\nshm_files.remove(os.environ)"
IN_ANOTHER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def why_not() -> str:
    done = subprocess.run([*IN_ANOTHER, "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "makes pid namespaces, which needs root and util-linux"


needs_namespaces = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(shm_files, "SHARED_MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A supervisor in another pid namespace, with a file."""
    command = [*IN_ANOTHER, sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_our_own_files_and_those_of_the_dead_are_removed(folder: Path) -> None:
    init, mine = owner_of(1), owner_of(os.getpid())
    namespace = str(init).rpartition("-")[2]
    kept = {f"lockstep-weights-{init}-0", "lockstep-0123", f"lockstep-weights-5-6-{OTHER}-0"}
    gone = {
        f"lockstep-weights-{mine}-0",
        f"lockstep-weights-4194399-1-{namespace}-0",
        f"lockstep-weights-4194399-1-{namespace}-1.new",
        f"lockstep-weights-1-99999999999-{namespace}-0",  # a pid used again
        f"lockstep-fault-4194399-1-{namespace}-1-77",
        f"lockstep-group-4194399-1-{namespace}-0123abcd",
    }
    for name in kept | gone:
        (folder / name).touch()
    assert remove(os.environ) == len(gone)
    assert set(names(folder)) == kept


@pytest.mark.parametrize("name", [f"lockstep-weights-5-6-{OTHER}-0", "lockstep-weights-4194399-1-0"])
def test_what_nobody_can_be_asked_about_goes_when_it_is_old(folder: Path, name: str) -> None:
    path = folder / name
    path.touch()
    assert remove(os.environ) == 0
    old = time.time() - UNCLAIMED_SECONDS - 1
    os.utime(path, (old, old))
    assert remove(os.environ) == 1


def test_what_was_claimed_by_one_that_has_ended_goes_at_once(folder: Path) -> None:
    for name in (f"lockstep-owner-5-6-{OTHER}-lives", f"lockstep-weights-5-6-{OTHER}-0"):
        (folder / name).touch()
    assert remove(os.environ) == 2


def test_a_claim_ends_with_its_supervisor(folder: Path) -> None:
    held = claim(os.environ)
    assert names(folder) == [f"lockstep-owner-{owner_of(os.getpid())}-lives"]
    assert remove(os.environ) == 1
    for descriptor in held:
        os.close(descriptor)


@needs_namespaces
def test_a_live_file_of_another_container_stays_until_its_owner_ends(
    folder: Path, elsewhere: subprocess.Popen[str]
) -> None:
    before = names(folder)
    assert [name.split("-")[1] for name in before] == ["owner", "weights"]
    assert remove(os.environ) == 0
    assert names(folder) == before
    elsewhere.kill()
    elsewhere.wait()
    deadline = time.monotonic() + 30
    while names(folder):  # the kernel ends the rest of the namespace
        remove(os.environ)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_namespaces
def test_another_container_leaves_ours_alone(folder: Path) -> None:
    held = claim(os.environ)
    (folder / f"lockstep-weights-{owner_of(os.getpid())}-0").touch()
    before = names(folder)
    subprocess.run([*IN_ANOTHER, sys.executable, "-c", REMOVER], check=True, timeout=60)
    assert names(folder) == before
    for descriptor in held:
        os.close(descriptor)
    subprocess.run([*IN_ANOTHER, sys.executable, "-c", REMOVER], check=True, timeout=60)
    assert names(folder) == []
