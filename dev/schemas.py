"""The schemas of projects that Lockstep's objects are for, in .dev/schemas: each out of the project's own Go module,
which is downloaded and not built. `python3 -m dev.schemas`."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dev.cluster import toolchain

TARGET: Final = Path(__file__).resolve().parents[1] / ".dev" / "schemas"
SECONDS: Final = 300


@dataclass(frozen=True)
class Module:
    """`checksum` is that of go.sum; `files` are copied, under their own names."""

    path: str
    version: str
    checksum: str
    files: tuple[str, ...]

    @property
    def coordinate(self) -> str:
        return f"{self.path}@{self.version}"


MODULES: Final = (
    Module(
        "sigs.k8s.io/gateway-api-inference-extension",
        "v1.6.0",
        "h1:cjtwMJYcTnLXBYE5ffR1/hHhn7U1aIFfe2RITYmOXVA=",
        ("config/crd/bases/inference.networking.k8s.io_inferencepools.yaml",),
    ),
    Module(
        "sigs.k8s.io/gateway-api",
        "v1.4.0",
        "h1:ZwlNM6zOHq0h3WUX2gfByPs2yAEsy/EenYJB78jpQfQ=",
        ("config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",),
    ),
    Module(
        "github.com/kedacore/keda/v2",
        "v2.18.0",
        "h1:ttR223fii/4QJ0YvtrhcWHaEoezByb/t5CeFopjl6EI=",
        ("config/crd/bases/keda.sh_scaledobjects.yaml",),
    ),
    Module(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        (
            *(
                f"example/prometheus-operator-crd/monitoring.coreos.com_{plural}.yaml"
                for plural in ("podmonitors", "servicemonitors", "prometheusrules")
            ),
            # What it makes of monitors.
            "pkg/prometheus/testdata/monitorObjectWithoutScrapeClass.golden",
            "pkg/prometheus/testdata/podMonitorObjectWithPodName.golden",
        ),
    ),
    Module(
        "istio.io/api",
        "v1.28.0",
        "h1:0fYY9G03CAdFwE/fCkpr0v7kKsy+Hz9OCCjLNBNLbnU=",
        ("kubernetes/customresourcedefinitions.gen.yaml", "annotation/annotations.yaml"),
    ),
)


def main() -> int:
    TARGET.mkdir(parents=True, exist_ok=True)
    stamp, wanted = TARGET / "modules", "".join(f"{one.coordinate} {one.checksum} {one.files}\n" for one in MODULES)
    with (TARGET / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return 0
        go = toolchain.find_go() or toolchain.install_go()
        if not all(_fetch(go, module) for module in MODULES):
            return 1
        stamp.write_text(wanted)
    return 0


def _fetch(go: str, module: Module) -> bool:
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"}
    command = [go, "mod", "download", "-json", module.coordinate]
    done = subprocess.run(
        command, cwd=TARGET, env=environment, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=False
    )
    found = json.loads(done.stdout or "{}")
    if done.returncode != 0 or found.get("Sum") != module.checksum:
        reason = found.get("Error") or f"its checksum is {found.get('Sum')} instead of {module.checksum}"
        print(f"{module.coordinate}: {reason}", file=sys.stderr)
        return False
    for file in module.files:
        copy = TARGET / Path(file).name
        copy.unlink(missing_ok=True)
        shutil.copyfile(Path(found["Dir"], file), copy)
    return True


if __name__ == "__main__":
    sys.exit(main())
