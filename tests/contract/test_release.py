"""`make release`: what it makes, pushes and signs, in which order; registry and signer are stand-ins that write down
what they are asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import yaml
from tests.support.chart import HELM, OLDEST_KUBERNETES, ROOT, Manifest, helm, one

import lockstep_runtime

REGISTRY: Final = "registry.example/lockstep"
VERSION: Final = lockstep_runtime.__version__
DIGESTS: Final = {name: f"sha256:{digit * 64}" for name, digit in (("operator", "a"), ("runtime", "b"), ("chart", "c"))}
BY_DIGEST: Final = [f"{REGISTRY}/{name}@{DIGESTS[name]}" for name in ("operator", "runtime")]

DOCKER = """#!/bin/sh
echo "docker $*" >> {log}
case "$*" in *operator.Dockerfile*) digest={operator};; *) digest={runtime};; esac
while [ "$1" != --metadata-file ]; do shift; done
echo "{{\\"containerimage.digest\\": \\"$digest\\"}}" > "$2"
"""
PODMAN = """#!/bin/sh
echo "podman $*" >> {log}
[ "$1" = push ] || exit 0
case "$4" in */operator:*) digest={operator};; *) digest={runtime};; esac
printf %s "$digest" > "$3"
"""
COSIGN = """#!/bin/sh
echo "cosign $*" >> {log}
"""
HELM_STANDIN = """#!/bin/sh
[ "$1" = push ] || exec {helm} "$@"
echo "helm $*" >> {log}
echo "Pushed: $3/lockstep" >&2
echo "Digest: {chart}" >&2
"""


class Place:
    """A copy of the working tree in a repository of its own, and the programs that it finds."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.out, self.log = folder / "tree", folder / "out", folder / "log"
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.log.touch()
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
            text=True, check=True,
        ).stdout  # fmt: skip
        needed = ("operator/", "runtime/", "charts/", "requirements/", "dev/", "docs/troubleshooting.md")
        for name in filter(None, listed.split("\0")):
            if (name.startswith(needed) or "/" not in name) and (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.tree / name)
        self.git("init", "--quiet")
        self.git("commit", "--quiet", "--allow-empty", "--message", "nothing")
        for program in ("git", "sh", "env", "sha256sum", "cat"):
            found = shutil.which(program)
            assert found
            (self.programs / program).symlink_to(found)
        self.program("helm", HELM_STANDIN)

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text.format(log=self.log, helm=HELM, **DIGESTS))
        path.chmod(0o755)

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example")
        subprocess.run(["git", *who, *arguments], cwd=self.tree, check=True, capture_output=True)

    def commit(self, *, tag: str = f"v{VERSION}") -> None:
        text = (self.tree / "CHANGELOG.md").read_text()
        (self.tree / "CHANGELOG.md").write_text(text.replace("## [Unreleased]", f"## [Unreleased]\n\n## [{VERSION}]"))
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "all")
        self.git("tag", tag)

    def release(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dev.release", "--registry", REGISTRY, "--out", str(self.out), *options]
        nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
        environment = os.environ | nowhere | {"PATH": str(self.programs), "PYTHONPATH": str(self.tree)}
        helm_option = ("--helm", str(self.programs / "helm"))
        return subprocess.run(
            [*command, *helm_option], cwd=self.tree, env=environment, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip

    def asked(self) -> list[str]:
        """The first words of what the stand-ins were asked for."""
        return [" ".join(line.split()[:3]) for line in self.log.read_text().splitlines()]

    def deployment(self) -> Manifest:
        """As the packaged chart renders it with no values at all."""
        package = str(self.out / f"lockstep-{VERSION}.tgz")
        result = helm("template", "lockstep", package, "--kube-version", OLDEST_KUBERNETES)
        assert result.returncode == 0, result.stderr
        return one([document for document in yaml.safe_load_all(result.stdout) if document], "Deployment")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, subprocess.CompletedProcess[str]]:
    """After a dry run, with what it said."""
    place = Place(tmp_path_factory.mktemp("release"))
    return place, place.release("--dry-run")


FILES: Final = {
    f"lockstep-{VERSION}-py3-none-any.whl",
    f"lockstep-{VERSION}.tgz",
    "operator.cdx.json",
    "runtime.cdx.json",
    "SHA256SUMS",
}


def images(deployment: Manifest) -> tuple[str, str]:
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    return container["image"], variables["LOCKSTEP_RUNTIME_IMAGE"]


def test_a_dry_run_makes_the_files_and_asks_nobody(dry: tuple[Place, subprocess.CompletedProcess[str]]) -> None:
    place, result = dry
    assert result.returncode == 0, result.stderr
    assert place.asked() == []
    assert {path.name for path in place.out.iterdir()} == FILES
    told = [line.removeprefix("would run: ") for line in result.stdout.splitlines() if line.startswith("would run")]
    assert [line.split()[0].rpartition("/")[2] for line in told] == ["docker", "docker", "helm", *["cosign"] * 6]
    refused = [line for line in result.stdout.splitlines() if line.startswith("a release would be refused")]
    assert any("none of docker, podman, buildah is installed" in line for line in refused)
    assert images(place.deployment())[0] == f"{REGISTRY}/operator@sha256:{'0' * 64}"

    sums = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=place.out, capture_output=True, check=False)
    assert sums.returncode == 0, sums.stdout
    listed = {line.split()[1] for line in (place.out / "SHA256SUMS").read_text().splitlines()}
    assert listed == FILES - {"SHA256SUMS"}


def test_what_is_released_names_what_was_pushed_and_is_signed(place: Place) -> None:
    place.program("docker", DOCKER)
    place.program("cosign", COSIGN)
    place.commit()
    result = place.release()
    assert result.returncode == 0, result.stderr + result.stdout
    signed = ["cosign sign --yes"] * 3 + ["cosign attest --yes"] * 2 + ["cosign sign-blob --yes"]
    assert place.asked() == ["docker buildx build"] * 2 + [f"helm push {place.out}/lockstep-{VERSION}.tgz", *signed]
    assert list(images(place.deployment())) == BY_DIGEST
    signatures = [line.split()[-1] for line in place.log.read_text().splitlines() if "cosign" in line][:5]
    assert signatures == [*BY_DIGEST, f"{REGISTRY}/charts/lockstep@{DIGESTS['chart']}", *BY_DIGEST]


def test_the_bill_of_materials_has_what_the_image_is_built_from(
    dry: tuple[Place, subprocess.CompletedProcess[str]],
) -> None:
    place, _ = dry
    for name, package in (("operator", "kopf"), ("runtime", "torch")):
        materials = json.loads((place.out / f"{name}.cdx.json").read_text())
        found = {component["name"]: component["version"] for component in materials["components"]}
        assert f"\n{package}=={found[package]} \\" in "\n" + (ROOT / "requirements" / f"{name}.txt").read_text()
        assert materials["bomFormat"] == "CycloneDX"
    assert "torch" not in (place.out / "operator.cdx.json").read_text()


def test_only_a_tree_that_can_be_found_again_is_released(place: Place) -> None:
    place.program("podman", PODMAN)
    place.commit(tag="v9.9.9")
    refused = place.release()
    assert refused.returncode != 0
    assert f"HEAD has no tag v{VERSION}" in refused.stderr
    place.git("tag", f"v{VERSION}")
    assert "cosign is not installed" in place.release().stderr
    (place.tree / "README.md").write_text("changed")
    assert "changes that are not committed" in place.release("--unsigned").stderr
    assert place.asked() == [], "nothing was pushed"
    place.git("checkout", "README.md")
    assert place.release("--unsigned").returncode == 0
    assert place.asked()[:-1] == ["podman build --file", "podman push --digestfile"] * 2, "and nothing is signed"
    assert list(images(place.deployment())) == BY_DIGEST
