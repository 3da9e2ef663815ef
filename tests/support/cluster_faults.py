"""Faults done to a model on the cluster, by `lockstep inject` as by a user or from its node; and who reads on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support import kubectl
from tests.support.cluster_model import RESOURCES, Model, Object, tiny_chat
from tests.support.stream import Stream, start
from tests.support.wait import until

STREAM_SECONDS: Final = 120.0
TOLD_SECONDS: Final = 30.0
API_PORT: Final = 8000
WORKER: Final = "lockstep: worker"  # how the process of a rank is called


def breakable(**spec: Any) -> Object:
    """A small model whose group takes faults from `lockstep inject`: the pod template's environment allows them."""
    container = {
        "name": "lockstep",
        "resources": RESOURCES,
        "env": [{"name": "LOCKSTEP_ALLOW_FAULTS", "value": "true"}],
    }
    return tiny_chat(**({"template": {"spec": {"containers": [container]}}} | spec))


def inject(model: Model, fault: str, rank: int, *options: str) -> None:
    """`lockstep inject` in the leader's pod of group 0."""
    command = ["lockstep", "inject", fault, f"--rank={rank}", *options]
    model.kubectl("exec", f"{model.name}-0-0", "--", *command)


# --- clients ---------------------------------------------------------------------------------------------------------


def read(model: Model, tokens: int, url: str | None = None) -> list[Stream]:
    """Start a stream for each of the requests, through the Service or at a leader's own address."""
    return start(url or model.url(), model.served(), tokens, STREAM_SECONDS)


def begun(readers: Sequence[Stream], pieces: int = 10) -> None:
    """Wait until each has so many pieces."""
    deadline = time.monotonic() + STREAM_SECONDS
    while not all(reader.pieces >= pieces for reader in readers):
        failed = [reader.error for reader in readers if reader.error]
        assert not failed, failed
        assert time.monotonic() < deadline, "the streams have not begun"
        time.sleep(0.005)


def address(pod: Object) -> str:
    """A leader's API, past the Service."""
    return f"http://{pod['status']['podIP']}:{API_PORT}"


# --- what is told ----------------------------------------------------------------------------------------------------


def events(model: Model) -> dict[str, Object]:
    """The Events about the model, by name."""
    found = model.api.items("events", model.namespace)
    about = [event for event in found if event["involvedObject"]["kind"] == "TensorParallelModel"]
    return {event["metadata"]["name"]: event for event in about if event["involvedObject"]["name"] == model.name}


def until_told(model: Model, known: set[str], reasons: Iterable[str], openings: Iterable[str]) -> None:
    """Until an Event that isn't `known` has one of the reasons and a message that opens with one of these words."""
    reasons, openings = set(reasons), tuple(openings)

    def look() -> bool:
        new = [event for name, event in events(model).items() if name not in known]
        return any(event["reason"] in reasons and event["message"].startswith(openings) for event in new)

    until(f"an Event {sorted(reasons)}: {openings}", look, TOLD_SECONDS, model.explain)


def restarts(model: Model) -> dict[str, int]:
    """Pod's UID -> how often its containers were started again."""
    return {
        pod["metadata"]["uid"]: sum(container["restartCount"] for container in pod["status"]["containerStatuses"])
        for pod in model.pods()
    }


# --- outages ---------------------------------------------------------------------------------------------------------


def kubelet() -> int:
    """The pid of the node's kubelet, as the embedded cluster noted it."""
    record = json.loads((kubectl.ROOT / ".dev" / "run" / "pids" / "kubelet.json").read_text())
    pid = int(record["pid"])
    assert "kubelet" in Path(f"/proc/{pid}/cmdline").read_text()
    return pid


def cut_off(pod: Object) -> AbstractContextManager[None]:
    """No packet reaches the pod or leaves it, as when its node's cable is pulled: the node routes all pods' traffic."""
    ip = pod["status"]["podIP"]
    return _dropping(pod, {"prerouting": f"ip saddr {ip} drop", "postrouting": f"ip daddr {ip} drop"})


def cut_between(one: Object, other: Object) -> AbstractContextManager[None]:
    """No packet gets from one of the two pods to the other; everybody else reaches both."""
    ips = f"{{ {one['status']['podIP']}, {other['status']['podIP']} }}"
    return _dropping(other, {"prerouting": f"ip saddr {ips} ip daddr {ips} drop"})


@contextmanager
def _dropping(pod: Object, drops: Mapping[str, str]) -> Iterator[None]:
    """Rules by the hook that they belong to, in chains named after the pod."""
    name = f"cut-{pod['metadata']['uid']}"
    for hook, drop in drops.items():
        _nft(f"table ip lockstep {{ chain {name}-{hook} {{ type filter hook {hook} priority raw; {drop}; }}\n}}")
    try:
        yield
    finally:
        for hook in drops:
            _nft(f"flush chain ip lockstep {name}-{hook}\ndelete chain ip lockstep {name}-{hook}")


def _nft(rules: str) -> None:
    """In the table of the embedded cluster, which goes with it."""
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
