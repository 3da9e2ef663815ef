"""A release: images by digest, the chart that names these digests, a wheel, bills of materials, checksums, signatures.

`make release REGISTRY=registry.example/lockstep` makes, pushes and signs it. With DRY_RUN=1 nothing leaves the machine:
what a registry would be needed for is printed, and the files are made with digests of zeros.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

ROOT: Final = Path(__file__).resolve().parents[1]
VERSION: Final = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
IMAGES: Final = {"operator": "image", "runtime": "runtimeImage"}  # name -> its block in the chart's values
BUILDERS: Final = ("docker", "podman", "buildah")
NO_DIGEST: Final = "sha256:" + "0" * 64  # of a dry run
CHECKSUMS: Final = "SHA256SUMS"
_PUSHED: Final = re.compile(r"^Digest: (sha256:[0-9a-f]{64})$", re.MULTILINE)  # how helm says what it has pushed


class ReleaseError(click.ClickException):
    """It can't be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Runs programs, in the repository. In a dry run those that need a registry are only told."""

    dry: bool
    helm: str

    def here(self, *command: str) -> str:
        """What stays on this machine."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ReleaseError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def there(self, *command: str) -> str:
        """What a registry, or a signer, is needed for."""
        click.echo(f"{'would run' if self.dry else 'runs'}: {shlex.join(command)}")
        return "" if self.dry else self.here(*command)

    def has(self, program: str) -> bool:
        return shutil.which(program) is not None


@click.command()
@click.option("--registry", required=True, help="Where images and chart go, such as registry.example/lockstep.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "build" / "release", help="Folder of the files.")
@click.option("--helm", default=str(ROOT / ".dev" / "bin" / "helm"))
@click.option("--unsigned", is_flag=True, help="Do without cosign.")
@click.option("--dry-run", is_flag=True, help="Push and sign nothing.")
def main(registry: str, out: Path, helm: str, unsigned: bool, dry_run: bool) -> None:
    machine, version = Machine(dry_run, helm), current_version()
    for problem in problems(machine, version, signed=not unsigned):
        if not dry_run:
            raise ReleaseError(problem)
        click.echo(f"a release would be refused: {problem}")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    references = {name: _image(machine, name, f"{registry}/{name}:{version}") for name in IMAGES}
    chart = _chart(machine, out, references)
    references["chart"] = _push_chart(machine, chart, registry)
    machine.here(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out))
    for name in IMAGES:
        _materials(machine, name, out)
    (out / CHECKSUMS).write_text(checksums(out))
    if not unsigned:
        _sign(machine, out, references)
    made = ", ".join(sorted(path.name for path in out.iterdir()))
    click.echo(f"{'dry run of ' if dry_run else ''}release {version}: {made}")


def current_version() -> str:
    found = VERSION.search((ROOT / "runtime" / "lockstep_runtime" / "__init__.py").read_text())
    if not found:
        raise ReleaseError("lockstep_runtime says no version")
    return found[1]


def problems(machine: Machine, version: str, *, signed: bool) -> Iterator[str]:
    """Why this tree must not be released, in words."""
    if machine.here("git", "status", "--porcelain"):
        yield "the working tree has changes that are not committed"
    if f"v{version}" not in machine.here("git", "tag", "--points-at", "HEAD").split():
        yield f"HEAD has no tag v{version}"
    if f"## [{version}]" not in (ROOT / "CHANGELOG.md").read_text():
        yield f"CHANGELOG.md has no section [{version}]"
    if not any(map(machine.has, BUILDERS)):
        yield f"none of {', '.join(BUILDERS)} is installed"
    if signed and not machine.has("cosign"):
        yield "cosign is not installed: install it, or release --unsigned"


def _image(machine: Machine, name: str, reference: str) -> str:
    """Builds and pushes it; returns its name with the digest that the registry has it by."""
    builder = next(filter(machine.has, BUILDERS), BUILDERS[0])
    source = ("--file", f"images/{name}.Dockerfile", "--tag", reference)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "pushed"
        if builder == "docker":
            machine.there("docker", "buildx", "build", "--push", "--metadata-file", str(told), *source, ".")
        else:
            machine.there(builder, "build", *source, ".")
            machine.there(builder, "push", "--digestfile", str(told), reference)
        digest = NO_DIGEST if machine.dry else pushed(told.read_text())
    return f"{reference.rpartition(':')[0]}@{digest}"


def pushed(text: str) -> str:
    """The digest, from docker's metadata or from the digest file of podman and buildah."""
    digest = str(json.loads(text)["containerimage.digest"]) if text.startswith("{") else text.strip()
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ReleaseError(f"the builder told no digest: {text!r}")
    return digest


def _chart(machine: Machine, out: Path, references: Mapping[str, str]) -> Path:
    """The package. Its values name the images, so that it installs without any."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT / "charts" / "lockstep", Path(folder) / "lockstep")
        values = copy / "values.yaml"
        text = values.read_text()
        for name, block in IMAGES.items():
            text = pinned(text, block, references[name])
        values.write_text(text)
        machine.here(machine.helm, "package", str(copy), "--destination", str(out))
    (package,) = out.glob("*.tgz")
    return package


def pinned(values: str, block: str, reference: str) -> str:
    """values.yaml with this image in its block."""
    head, start, rest = values.partition(f"\n{block}:\n")
    repository, _, digest = reference.partition("@")
    for name, value in (("repository", repository), ("digest", digest)):
        rest, count = re.subn(rf'^  {name}: ""$', f'  {name}: "{value}"', rest, count=1, flags=re.MULTILINE)
        if not start or not count:
            raise ReleaseError(f"values.yaml has no empty {block}.{name}")
    return head + start + rest


def _push_chart(machine: Machine, package: Path, registry: str) -> str:
    said = machine.there(machine.helm, "push", str(package), f"oci://{registry}/charts")
    found = _PUSHED.search(said)
    if not machine.dry and not found:
        raise ReleaseError(f"helm told no digest: {said}")
    return f"{registry}/charts/lockstep@{found[1] if found else NO_DIGEST}"


def _materials(machine: Machine, name: str, out: Path) -> None:
    """What Python packages are in the image, by the requirements that it is built from."""
    target = ("--output-reproducible", "--output-file", str(out / f"{name}.cdx.json"))
    source = (f"requirements/{name}.txt", "--pyproject", "pyproject.toml")
    machine.here(sys.executable, "-m", "cyclonedx_py", "requirements", *source, *target)


def checksums(out: Path) -> str:
    """As `sha256sum --check` reads them."""
    files: Sequence[Path] = sorted(path for path in out.iterdir() if path.name != CHECKSUMS)
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def _sign(machine: Machine, out: Path, references: Mapping[str, str]) -> None:
    for reference in references.values():
        machine.there("cosign", "sign", "--yes", reference)
    for name in IMAGES:
        materials = ("--type", "cyclonedx", "--predicate", str(out / f"{name}.cdx.json"))
        machine.there("cosign", "attest", "--yes", *materials, references[name])
    bundle = str(out / f"{CHECKSUMS}.sigstore.json")
    machine.there("cosign", "sign-blob", "--yes", "--bundle", bundle, str(out / CHECKSUMS))


if __name__ == "__main__":
    main()
