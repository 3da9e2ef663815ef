"""Faults done to a model on the cluster, by `lockstep inject` as by a user or from its node, and clients that read on.

All streams ask with the same requests, greedy and seeded, so that the texts of two runs can be compared.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from tests.support import kubectl
from tests.support.cluster_model import RESOURCES, Model, Object, tiny_chat
from tests.support.cluster_wait import until

STREAM_SECONDS: Final = 120.0
TOLD_SECONDS: Final = 30.0
API_PORT: Final = 8000
REQUESTS: Final = (
    {"prompt": "What is a module? ", "temperature": 0},
    {"prompt": "The for statement is used to", "temperature": 1.0, "seed": 7},
)
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


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client can tell of a stream that has ended."""

    text: str
    finish: str  # the finish reason; empty when none came
    done: bool  # `data: [DONE]` was the last event
    error: str

    @property
    def looks_whole(self) -> bool:
        return bool(self.finish) or self.done


class Reader:
    """A streamed completion, read by a thread of its own. `times` are those of its pieces, monotonic seconds."""

    def __init__(self, url: str, request: Object) -> None:
        self.text, self.finish, self.done, self.error = "", "", False, ""
        self.times: list[float] = []
        self._url, self._body = f"{url}/v1/completions", {"stream": True, "ignore_eos": True, **request}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self) -> Answer:
        self._thread.join(STREAM_SECONDS)
        assert not self._thread.is_alive(), f"the stream does not end; {len(self.times)} pieces came: {self.text!r}"
        return Answer(self.text, self.finish, self.done, self.error)

    @property
    def pause(self) -> float:
        """The longest time between two pieces, seconds."""
        return max((later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=STREAM_SECONDS) as answer:
                if answer.status_code != httpx.codes.OK:
                    self.error = f"{answer.status_code}: {answer.read().decode()}"
                for line in answer.iter_lines():
                    self._take(line)
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _take(self, line: str) -> None:
        self.done = self.done or line == "data: [DONE]"
        if not line.startswith("data: {"):
            return
        event = json.loads(line.removeprefix("data: "))
        self.error = self.error or str(event.get("error", ""))
        for choice in event.get("choices", []):
            if choice["text"]:
                self.text += choice["text"]
                self.times.append(time.monotonic())
            self.finish = choice.get("finish_reason") or self.finish


def read(model: Model, tokens: int, url: str | None = None) -> list[Reader]:
    """Start a stream for each of the requests, through the Service or at a leader's own address."""
    where, name = url or model.url(), model.served()
    return [Reader(where, {"model": name, "max_tokens": tokens, **request}) for request in REQUESTS]


def begun(readers: Sequence[Reader], pieces: int = 10) -> None:
    """Wait until each has so many pieces."""
    deadline = time.monotonic() + STREAM_SECONDS
    while not all(len(reader.times) >= pieces for reader in readers):
        failed = [reader.error for reader in readers if reader.error]
        assert not failed, failed
        assert time.monotonic() < deadline, "the streams have not begun"
        time.sleep(0.005)


def answers(readers: Sequence[Reader]) -> list[Answer]:
    return [reader.wait() for reader in readers]


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


@contextmanager
def cut_off(pod: Object) -> Iterator[None]:
    """No packet reaches the pod or leaves it, as when its node's cable is pulled: the node routes all pods' traffic."""
    ip, name = pod["status"]["podIP"], f"cut-{pod['metadata']['uid']}"
    drops = {"prerouting": f"ip saddr {ip} drop", "postrouting": f"ip daddr {ip} drop"}
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
