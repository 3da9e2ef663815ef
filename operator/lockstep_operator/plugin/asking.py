"""Groups asked inside their own first pods: their status and metrics, faults on purpose, streams."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from lockstep_operator.plugin.session import PluginError, Session
from lockstep_operator.types.names import CONTAINER, GROUP_LABEL, POD_INDEX_LABEL, selector
from lockstep_operator.types.observed import Object
from lockstep_runtime.protocol.status import GroupStatus

PROBE_SECONDS: Final = 1.0
ALLOWS_FAULTS: Final = "LOCKSTEP_ALLOW_FAULTS"
_TRUE: Final = ("true", "1", "yes", "on")
_PROGRAMS: Final = Path(__file__).with_name("inside")


@dataclass(frozen=True, slots=True)
class Probe:
    """A group as it is now: its status, its metrics by name, and tokens per second."""

    status: GroupStatus
    metrics: Mapping[str, float]
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got of one stream. `pause`: the longest time between two pieces, in seconds."""

    text: str
    finish: str
    error: str
    pause: float


async def leaders(session: Session, model: str) -> dict[int, Object]:
    """The first pod of each group that has a running one, by group."""
    pods = await session.kube.find("Pod", session.namespace, labels=selector(model))
    found = {
        int(pod["metadata"]["labels"][GROUP_LABEL]): pod
        for pod in pods
        if pod["metadata"]["labels"].get(POD_INDEX_LABEL) == "0"
        and (pod.get("status") or {}).get("phase") == "Running"
        and "deletionTimestamp" not in pod["metadata"]
    }
    return dict(sorted(found.items()))


def allows_faults(pod: Object) -> bool:
    """Whether its ranks take `lockstep inject`."""
    container: Mapping[str, Any] = next((one for one in pod["spec"]["containers"] if one["name"] == CONTAINER), {})
    return any(entry["name"] == ALLOWS_FAULTS and entry.get("value") in _TRUE for entry in container.get("env") or [])


async def probe(session: Session, pod: str, apart: float = PROBE_SECONDS) -> Probe:
    """`apart` seconds are between the two looks that tokens per second come from; 0: they are not asked for."""
    found = json.loads(await session.execute(pod, _program("probe", str(apart))))
    first, second = (samples(text) for text in found["metrics"])
    made = second.get("lockstep_generation_tokens_total", 0.0) - first.get("lockstep_generation_tokens_total", 0.0)
    rate = max(0.0, made) / found["seconds"] if apart else 0.0  # a counter that fell: the engine was started again
    return Probe(msgspec.convert(found["status"], GroupStatus), second, rate)


async def inject(session: Session, pod: str, fault: str, rank: int, options: Sequence[str] = ()) -> str:
    """`lockstep inject` in the group's first pod; its words."""
    said = await session.execute(pod, ["lockstep", "inject", fault, f"--rank={rank}", *options])
    return said.strip()


async def stream(session: Session, pod: str, served: str, tokens: int, seconds: float) -> list[Answer]:
    """Read some streams to their end."""
    said = await session.execute(pod, _program("streams", served, str(tokens), str(seconds)), seconds + 30)
    return [Answer(**one) for one in json.loads(said)]


def samples(text: str) -> dict[str, float]:
    """Of Prometheus' text format: the values of each name, summed over labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _program(name: str, *arguments: str) -> list[str]:
    return ["python3", "-c", (_PROGRAMS / f"{name}.py").read_text(), *arguments]


async def leader_of(session: Session, model: str, group: int) -> Object:
    """Raises PluginError when the group has no first pod that runs."""
    found = (await leaders(session, model)).get(group)
    if found is None:
        raise PluginError(f"group {group} of {model} has no first pod that runs: see `kubectl lockstep status {model}`")
    return found


def name_of(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"]["name"])
