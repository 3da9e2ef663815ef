"""Neither program needs the extra `tracing`: without it there are no traces, and all else is as ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry" and name.startswith({absent!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in {modules!r}:
    importlib.import_module(name)
"""
ENGINE = ("lockstep_runtime.engine.main", "lockstep_runtime.api.app", "lockstep_runtime.tracing.traces")


@pytest.mark.parametrize(
    ("absent", "modules"),
    [("opentelemetry.sdk", ENGINE), ("opentelemetry", ("lockstep_operator.__main__",))],
    ids=["engine", "operator"],
)
def test_it_is_imported_where_a_collector_is_named_alone(absent: str, modules: tuple[str, ...]) -> None:
    program = PROGRAM.format(absent=absent, modules=modules)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
