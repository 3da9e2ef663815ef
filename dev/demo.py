"""The end of `make demo`: apply a model, watch it become Ready, chat with it, break its ranks, look at its status."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from dev.demo_faults import ask, suffer
from dev.demo_terminal import CONTEXT, ROOT, TOOL, Page, command, kubectl, run, say, show
from openai import OpenAI

MODEL: Final = "tiny-chat"
EXAMPLE: Final = "examples/tiny-chat.yaml"
PATCH: Final = "examples/patches/allow-faults.yaml"
PATIENCE_S: Final = 180.0
QUESTIONS: Final = ("Who are you?", "Explain lambda expressions.")
LONG_QUESTION: Final = "Tell me everything about exceptions."


def main() -> int:
    os.chdir(ROOT)
    if not CONTEXT:
        os.environ["KUBECONFIG"] = str(ROOT / ".dev" / "kubeconfig")
        os.environ["PATH"] = f"{ROOT / '.dev' / 'bin'}:{os.environ['PATH']}"
    apply()
    if not wait_until_ready():
        run(("describe", "tpm", MODEL))
        return 1
    with service_url() as url:
        problem = chat(url)
    run(("get", "tpm"))
    show(f"kubectl describe tpm {MODEL}")
    print(excerpt(kubectl("describe", "tpm", MODEL)))
    if problem:
        print(f"\nThe demo failed: {problem}", file=sys.stderr)
        return 1
    print(what_next())
    return 0


def apply() -> None:
    """The example, with faults on purpose allowed: the file that people copy doesn't allow them."""
    patched = ("patch", "--local", "--type=merge", "-f", EXAMPLE, "--patch-file", PATCH, "-o", "yaml")
    show(f"kubectl {' '.join(patched)} |\n    kubectl apply -f -")
    print(kubectl("apply", "-f", "-", stdin=kubectl(*patched)))
    say("Two pods start, one rank in each; every rank reads its own half of the weights.")


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
    forwarding = command("port-forward", f"service/{MODEL}", ":8000")
    with subprocess.Popen(forwarding, stdout=subprocess.PIPE, text=True) as forward:
        try:
            assert forward.stdout is not None
            port = forward.stdout.readline().split(" -> ")[0].rpartition(":")[2]
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            forward.terminate()


def chat(url: str) -> str:
    """Some answers, and one that faults befall; what went wrong, or nothing."""
    say(f"A chat through its Service, with the openai client: OpenAI(base_url={url!r})")
    client, page = OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0), Page()
    for question in (*QUESTIONS, LONG_QUESTION):
        answer = ask(client, MODEL, question, page)
        if answer.error:
            return f"no answer to {question!r}: {answer.error}"
    say("The same again. While it answers, rank 1 will hang, and then rank 0's process will be killed:")
    return suffer(client, MODEL, LONG_QUESTION, answer.text)


def excerpt(description: str) -> str:
    """The part of `kubectl describe` that tells how the model is."""
    lines = description.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith("Status:")), 0)
    return "\n".join(["  ...", *lines[start:]])


def what_next() -> str:
    commands = {
        f"{TOOL} -n lockstep-system port-forward pod/HOLDER 8081": "the live page; `get lease` names the holder",
        f"{TOOL} get pods --watch": "while you do one of these:",
        f"{TOOL} exec {MODEL}-0-0 -- lockstep inject sigkill --rank 1": "another fault; docs/recovery.md has them all",
        f"{TOOL} delete pod {MODEL}-0-1": "it comes back, and the status tells",
        f"{TOOL} scale tpm {MODEL} --replicas 2": "a second group of ranks",
        f"{TOOL} explain tpm.spec": "the manual",
        f"{TOOL} delete tpm {MODEL}": "with all that belongs to it",
    }
    lines = ["", "What to try next:"]
    if not CONTEXT:
        lines.append("  export KUBECONFIG=$PWD/.dev/kubeconfig PATH=$PWD/.dev/bin:$PATH")
        commands["make cluster-down"] = "leave nothing behind"
    width = max(map(len, commands))
    return "\n".join([*lines, *(f"  {command:{width}}  # {what}" for command, what in commands.items())])


if __name__ == "__main__":
    sys.exit(main())
