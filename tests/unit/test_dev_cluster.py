"""The embedded cluster's pure parts, and its care for processes that aren't its own."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from dev import go_tool
from dev.cluster import build_store, host, pause, processes, toolchain
from dev.cluster.progress import Failure

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


def test_chain_ids_name_a_layer_with_all_below_it() -> None:
    second = "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {C}".encode()).hexdigest()
    assert build_store.chain_ids((A, B, C)) == [A, second, third]


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        ("mount -t bind /s/1/fs /target -o rw,rbind", "/s/1/fs"),
        (
            "mount -t overlay overlay /target -o index=off,workdir=/s/2/work,upperdir=/s/2/fs,lowerdir=/s/1/fs",
            "/s/2/fs",
        ),
    ],
)
def test_a_snapshots_own_files_are_found_in_its_mount_command(command: str, folder: str) -> None:
    assert build_store.writable_folder(command) == folder


def test_the_archive_of_a_linked_image_names_it_and_carries_no_layer() -> None:
    image = build_store.Image(b'{"layers": []}', b"{}", (A,), (Path("/layer"),))
    with tarfile.open(fileobj=io.BytesIO(build_store.layout(image, "localhost/x:dev"))) as archive:
        index = json.load(archive.extractfile("index.json") or io.BytesIO())
        names = {Path(name).name for name in archive.getnames() if name.startswith("blobs/")}
    assert index["manifests"][0]["annotations"] == {"io.containerd.image.name": "localhost/x:dev"}
    assert names == {hashlib.sha256(content).hexdigest() for content in (image.manifest, image.config)}


def test_the_pause_image_is_the_same_for_the_same_program() -> None:
    assert pause.image(b"program") == pause.image(b"program")
    assert pause.image(b"program") != pause.image(b"another")


def test_the_components_are_told_the_version_that_go_mod_requires() -> None:
    flags = toolchain.version_flags("require (\n\tk8s.io/kubernetes v1.34.4\n)")
    assert "k8s.io/component-base/version.gitVersion=v1.34.4" in flags
    assert "gitMinor=34" in flags
    with pytest.raises(Failure):
        toolchain.version_flags("require ()")


def test_a_process_that_has_the_recorded_pid_but_not_its_start_time_is_not_stopped() -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        ticks = processes.start_ticks(stranger.pid)
        assert ticks is not None
        reused = processes.Daemon("kubelet", stranger.pid, ticks - 1)
        processes.stop([reused], patience=0.1)
        assert stranger.poll() is None
        processes.stop([processes.Daemon("kubelet", stranger.pid, ticks)], patience=5)
        assert stranger.wait(timeout=5) != 0


def test_an_ended_process_has_no_start_time() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
    assert processes.start_ticks(child.pid) is None


def test_who_is_not_root_is_pointed_to_what_needs_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Failure, match=r"needs root(.|\n)*lockstep serve"):
        host.check()


def test_a_program_that_nothing_describes_is_not_built() -> None:
    with pytest.raises(Failure, match=r"there is no helmet: dev/tools has .*kwok"):
        go_tool.ensure("helmet")
