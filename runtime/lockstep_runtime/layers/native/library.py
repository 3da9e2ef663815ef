"""Compiles the kernels, and finds what was compiled.

The images and `make venv` compile them once (`python -m lockstep_runtime.layers.native.library`); a rank that finds
none computes by torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

FOLDER: Final = Path(__file__).parent
SOURCES: Final = ("attention.c", "delta_rule.c", "norm.c")
COMPILER: Final = "gcc"
# Sums may be taken in another order, so that they are vectors; what is not a number stays that.
OPTIONS: Final = (
    *("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O3", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
LEVELS: Final = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}  # torch's
Argument = type[ctypes.c_void_p] | type[ctypes.c_int64] | type[ctypes.c_double]
ELEMENTS: Final = {torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT32"}


def compile_all(folder: Path = FOLDER) -> None:
    """For every level of this CPU's family, and type. Other families than x86 have none yet.

    Raises:
        subprocess.CalledProcessError: the compiler has said why.
        FileNotFoundError: there is no compiler.
    """
    if platform.machine() != "x86_64":
        return
    for level, flags in LEVELS.items():
        for dtype, element in ELEMENTS.items():
            made = path_of(level, dtype, folder)
            being_made = made.with_suffix(f"{made.suffix}.new")  # a process that has the old one mapped keeps it
            sources = [str(FOLDER / source) for source in SOURCES]
            subprocess.run([COMPILER, *OPTIONS, *flags, f"-D{element}", "-o", being_made, *sources], check=True)
            being_made.replace(made)


def path_of(level: str, dtype: torch.dtype, folder: Path = FOLDER) -> Path:
    return folder / f"kernels-{level}-{ELEMENTS[dtype]}.so".lower()


@functools.cache
def load(dtype: torch.dtype, level: str | None = None) -> ctypes.CDLL:
    """
    Args:
        level: of the CPU's instructions; None: the highest it has.

    Raises:
        OSError: there is none for this CPU and type.
    """
    level = level or torch.backends.cpu.get_cpu_capability()
    if level not in LEVELS or dtype not in ELEMENTS:
        raise OSError(f"there are no kernels in C for {dtype} on a CPU with {level}")
    return ctypes.CDLL(str(path_of(level, dtype)))


def function(library: ctypes.CDLL, name: str, *arguments: Argument) -> Callable[..., None]:
    """One of its kernels. Others run meanwhile: it holds no lock of Python's."""
    found = library[name]
    found.argtypes, found.restype = arguments, None
    return found


if __name__ == "__main__":
    try:
        compile_all()
    except FileNotFoundError:
        sys.exit(f"the kernels of CPUs are written in C, and there is no {COMPILER}: install it, and try again")
