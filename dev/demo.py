"""The end of `make demo`: apply a model, watch it become Ready, chat with it, look at its status."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from openai import OpenAI

ROOT: Final = Path(__file__).resolve().parents[1]
CONTEXT: Final = os.environ.get("CONTEXT", "")
MODEL: Final = "tiny-chat"
PATIENCE_S: Final = 180.0
QUESTIONS: Final = ("Who are you?", "What is a for loop?", "Explain lambda expressions.")


def main() -> int:
    if not CONTEXT:
        os.environ["KUBECONFIG"] = str(ROOT / ".dev" / "kubeconfig")
        os.environ["PATH"] = f"{ROOT / '.dev' / 'bin'}:{os.environ['PATH']}"
    show("kubectl apply -f examples/tiny-chat.yaml")
    print(kubectl("apply", "-f", str(ROOT / "examples" / "tiny-chat.yaml")))
    say("Two pods start, one rank in each; every rank reads its own half of the weights.")
    if not wait_until_ready():
        show(f"kubectl describe tpm {MODEL}")
        print(kubectl("describe", "tpm", MODEL))
        return 1
    with service_url() as url:
        chat(url)
    show("kubectl get tpm")
    print(kubectl("get", "tpm"))
    show(f"kubectl describe tpm {MODEL}")
    print(excerpt(kubectl("describe", "tpm", MODEL)))
    print(what_next())
    return 0


def wait_until_ready() -> bool:
    """Show every change of the status until the model is Ready; False when it isn't after PATIENCE_S."""
    started = time.monotonic()
    shown = ""
    while time.monotonic() - started < PATIENCE_S:
        model = json.loads(kubectl("get", "tpm", MODEL, "-o", "json"))
        ready, now = summary(model)
        if now != shown:
            print(f"{time.monotonic() - started:7.1f} s  {now}", flush=True)
            shown = now
        if ready:
            return True
        time.sleep(0.25)
    say(f"{MODEL} is not Ready after {PATIENCE_S:.0f} s. This is what its status says:")
    return False


def summary(model: dict[str, Any]) -> tuple[bool, str]:
    """Whether the model is Ready by the spec that was applied, and its Ready condition in one line."""
    conditions = model.get("status", {}).get("conditions", [])
    ready = next((condition for condition in conditions if condition["type"] == "Ready"), None)
    if ready is None or ready.get("observedGeneration") != model["metadata"]["generation"]:
        return False, "the operator has not looked at it yet"
    return ready["status"] == "True", f"{ready['reason']}: {ready['message']}"


@contextmanager
def service_url() -> Iterator[str]:
    """The Service's address: its ClusterIP, which the embedded cluster's host can reach, or else a port-forward."""
    if not CONTEXT:
        address = kubectl("get", "service", MODEL, "-o", "jsonpath={.spec.clusterIP}")
        yield f"http://{address}:8000/v1"
        return
    command = ["kubectl", "--context", CONTEXT, "port-forward", f"service/{MODEL}", ":8000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            port = forward.stdout.readline().split(" -> ")[0].rpartition(":")[2]
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            forward.terminate()


def chat(url: str) -> None:
    say(f"A chat through its Service, with the openai client: OpenAI(base_url={url!r})")
    client = OpenAI(base_url=url, api_key="none", timeout=60)
    for question in QUESTIONS:
        print(f"\n  you        {question}\n  {MODEL}  ", end="", flush=True)
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=80, temperature=0, stream=True
        )
        for chunk in stream:
            text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
            print(text.replace("\n", "\n" + " " * 13), end="", flush=True)
    print()


def excerpt(description: str) -> str:
    """The part of `kubectl describe` that tells how the model is."""
    lines = description.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith("Status:")), 0)
    return "\n".join(["  ...", *lines[start:]])


def what_next() -> str:
    tool = f"kubectl --context {CONTEXT}" if CONTEXT else "kubectl"
    commands = {
        f"{tool} get pods --watch": "while you do one of these:",
        f"{tool} delete pod {MODEL}-0-1": "it comes back, and the status tells",
        f"{tool} scale tpm {MODEL} --replicas 2": "a second group of ranks",
        f"{tool} explain tpm.spec": "the manual",
        f"{tool} delete tpm {MODEL}": "with all that belongs to it",
    }
    lines = ["", "What to try next:"]
    if not CONTEXT:
        lines.append("  export KUBECONFIG=$PWD/.dev/kubeconfig PATH=$PWD/.dev/bin:$PATH")
        commands["make cluster-down"] = "leave nothing behind"
    width = max(map(len, commands))
    return "\n".join([*lines, *(f"  {command:{width}}  # {what}" for command, what in commands.items())])


def kubectl(*arguments: str) -> str:
    context = ["--context", CONTEXT] if CONTEXT else []
    done = subprocess.run(["kubectl", *context, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.rstrip()


def show(command: str) -> None:
    print(f"\n\033[1m$ {command}\033[0m", flush=True)


def say(text: str) -> None:
    print(f"\n\033[36m{text}\033[0m", flush=True)


if __name__ == "__main__":
    sys.exit(main())
