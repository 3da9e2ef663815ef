"""The software's and the machine's part of a report. Imports no torch, starts no process and opens no device."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

import lockstep_runtime
from lockstep_runtime.host import cgroup
from lockstep_runtime.redaction import Redact, is_secret_name

ROOT: Final = Path("/")
_LIBRARIES: Final = ("torch", "numpy", "msgspec", "tokenizers", "safetensors", "huggingface_hub", "fastapi",
                     "starlette", "uvicorn", "jinja2")  # fmt: skip
_CPU_FLAGS: Final = re.compile(r"avx\w*|amx\w*|fma|f16c|sse4_2|asimd\w*|bf16|i8mm|sve\w*")  # kernels need them
_VARIABLES: Final = re.compile(r"(?:LOCKSTEP|NCCL|CUDA|NVIDIA|OMP|MKL|TORCH|PYTORCH|HF)_\w+")
_MAX_GPUS: Final = 16
_MAX_VALUE: Final = 500  # characters

Facts = dict[str, str]


def versions(root: Path = ROOT) -> Facts:
    """Of Lockstep, Python, the libraries that it is made of, CUDA's among them, and the driver."""
    facts = {"lockstep": lockstep_runtime.__version__, "python": sys.version.replace("\n", " ")}
    installed = {str(one.name).lower().replace("-", "_"): one.version for one in metadata.distributions() if one.name}
    cuda = sorted(name for name in installed if name.startswith(("nvidia_", "cuda_")))
    facts |= {name: installed[name] for name in (*_LIBRARIES, *cuda) if name in installed}
    if torch := installed.get("torch"):
        facts["torch built for"] = (
            f"CUDA {built[0]}" if (built := re.findall(r"\+cu(\d+)", torch)) else _cuda_of_torch()
        )
    facts["nvidia driver"] = _first_line(root / "proc/driver/nvidia/version") or "none"
    return facts


def _cuda_of_torch() -> str:
    """torch/version.py has a line `cuda: Optional[str] = '13.0'`, or None."""
    for file in metadata.files("torch") or ():
        if file.as_posix() == "torch/version.py":
            found = re.search(r"^cuda\b.*=\s*'([^']+)'", file.read_text(), re.MULTILINE)
            return f"CUDA {found[1]}" if found else "no CUDA"
    return "unknown"


def machine(root: Path = ROOT) -> Facts:
    """Kernel, processor, memory, GPUs, and what the control groups leave of them."""
    uname = platform.uname()
    facts = {"kernel": f"{uname.system} {uname.release} {uname.machine}", "system": _os_name(root)}
    facts |= _processor(root)
    facts["cpus"] = f"{os.cpu_count()} in the machine, {cgroup.cpus(root):g} for this process"
    facts["memory"] = ", ".join(_fields(root / "proc/meminfo", ("MemTotal", "MemAvailable", "SwapTotal")))
    use, peak = cgroup.memory_use(root), cgroup.most_used(root)
    limit = f"{_mib(use.limit)}, used {_mib(use.used)}, of that reclaimable {_mib(use.reclaimable)}" if use else "none"
    facts["cgroup memory limit"] = limit + (f", peak {_mib(peak)}" if peak is not None else "")
    facts["cgroup OOM kills"] = str(cgroup.out_of_memory_kills(root))
    facts["shared memory"] = _file_system(root / "dev/shm")
    facts["open files"] = "{} (hard {})".format(*resource.getrlimit(resource.RLIMIT_NOFILE))
    return facts | _gpus(root)


def variables(environment: Mapping[str, str], redact: Redact) -> Facts:
    """The settings among the environment's variables, and of secret ones only that they are set."""
    named = {name: value for name, value in sorted(environment.items()) if _VARIABLES.fullmatch(name)}
    return {name: "[set]" if is_secret_name(name) else redact(value)[:_MAX_VALUE] for name, value in named.items()}


def _os_name(root: Path) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', _text(root / "etc/os-release"), re.MULTILINE)
    return found[1] if found else "unknown"


def _processor(root: Path) -> Facts:
    first = _text(root / "proc/cpuinfo").partition("\n\n")[0]
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", first, re.MULTILINE))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "processor": fields.get("model name", "unknown"),
        "processor flags": " ".join(flag for flag in flags if _CPU_FLAGS.fullmatch(flag)) or "none",
    }


def _gpus(root: Path) -> Facts:
    """As the driver lists them, by PCI address."""
    folders = sorted((root / "proc/driver/nvidia/gpus").glob("*"))[:_MAX_GPUS]
    return {
        f"gpu {folder.name}": "; ".join(_fields(folder / "information", ("Model", "GPU Firmware")))
        for folder in folders
    }


def _fields(path: Path, names: tuple[str, ...]) -> list[str]:
    """`name value` of lines `name: value`."""
    pairs = re.findall(r"^([^:\n]+):\s*(.*?)\s*$", _text(path), re.MULTILINE)
    return [f"{name.strip()} {value}" for name, value in pairs if name.strip() in names]


def _file_system(path: Path) -> str:
    try:
        stat = os.statvfs(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return f"{_mib(stat.f_blocks * stat.f_frsize)}, free {_mib(stat.f_bavail * stat.f_frsize)}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _first_line(path: Path) -> str:
    return _text(path).partition("\n")[0].strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
