"""kubectl as a user runs it: a program that is given words and answers with text."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
KUBECONFIG: Final = ROOT / ".dev" / "kubeconfig"
OWN_KUBECTL: Final = ROOT / ".dev" / "bin" / "kubectl"

REFUSED: Final = "Error from server"  # how kubectl begins to tell of each refusal

Object = dict[str, Any]


class KubectlError(AssertionError):
    """kubectl refused; the text is its own. An assertion error, so that a test that did not expect it fails by it."""


def command(*arguments: str) -> list[str]:
    """The words that run kubectl against the embedded cluster."""
    program = str(OWN_KUBECTL) if OWN_KUBECTL.exists() else "kubectl"
    return [program, f"--kubeconfig={KUBECONFIG}", *arguments]


def attempt(*arguments: str, stdin: str | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run kubectl against the embedded cluster and hand back whatever it said."""
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, text=True, timeout=timeout, check=False
    )


def kubectl(*arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
    """Run kubectl and hand back what it printed.

    Raises:
        KubectlError: it ended with anything but 0; the text is what it wrote to stderr.
    """
    result = attempt(*arguments, stdin=stdin, timeout=timeout)
    if result.returncode != 0:
        raise KubectlError(f"kubectl {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


def apply(manifest: Mapping[str, Any], *options: str) -> str:
    """`kubectl apply -f -` of one object."""
    return apply_all([manifest], *options)


def apply_all(manifests: Iterable[Mapping[str, Any]], *options: str) -> str:
    """The same of many at once: one kubectl takes a third of a second to start."""
    return kubectl("apply", *options, "-f", "-", stdin=yaml.safe_dump_all(map(dict, manifests), sort_keys=False))


def refusals(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `kubectl apply` says to each of these, which must all be refused; nothing is kept even if one is not."""
    documents = yaml.safe_dump_all(map(dict, manifests), sort_keys=False)
    result = attempt("apply", "--dry-run=server", "-f", "-", stdin=documents)
    said = result.stderr.split(REFUSED)[1:]
    assert len(said) == len(manifests), f"the API server took what it must refuse:\n{result.stdout}{result.stderr}"
    return said


def difference(manifest: Mapping[str, Any]) -> str:
    """`kubectl diff` of what is applied and what is stored, as GitOps tools look for drift; empty without any."""
    found = attempt("diff", "-f", "-", stdin=json.dumps(manifest))
    if found.returncode not in (0, 1):
        raise KubectlError(f"kubectl diff: {found.stderr.strip()}")
    return found.stdout


def describe(namespace: str, kind: str, name: str) -> str:
    """`kubectl describe`, or its error: for a failing test to show."""
    result = attempt("-n", namespace, "describe", kind, name)
    return result.stdout or result.stderr


def get(*arguments: str) -> Object:
    """`kubectl get ... -o json`, parsed."""
    parsed: Object = json.loads(kubectl("get", *arguments, "-o", "json"))
    return parsed
