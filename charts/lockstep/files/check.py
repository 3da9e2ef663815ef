"""`helm test`: does the operator answer, and may its account read the models whose CRD this chart installed?

Runs in the operator's image with nothing but the standard library. Arguments: `NAME=URL` of things that must answer
200. An https URL is the API server's, and is asked with the pod's own token.
"""

import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

CREDENTIALS = Path(os.environ.get("CREDENTIALS", "/var/run/secrets/kubernetes.io/serviceaccount"))
DEADLINE_SECONDS = float(os.environ.get("DEADLINE_SECONDS", "60"))
PAUSE_SECONDS = 1.0
REQUEST_SECONDS = 5.0


def get(url: str) -> str:
    """Returns "" when the URL answers 200, else why it does not."""
    request = urllib.request.Request(url)  # noqa: S310 - the chart's own addresses
    context = None
    try:
        if url.startswith("https:"):
            request.add_header("Authorization", f"Bearer {(CREDENTIALS / 'token').read_text()}")
            context = ssl.create_default_context(cafile=str(CREDENTIALS / "ca.crt"))
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS, context=context) as response:  # noqa: S310
            return "" if response.status == 200 else f"answered {response.status}"
    except urllib.error.HTTPError as error:
        return f"answered {error.code}: {error.read(500).decode(errors='replace')}"
    except OSError as error:
        return str(error)


def check(name: str, url: str, deadline: float) -> bool:
    """Asks until the URL answers 200 or the deadline (monotonic seconds) has passed."""
    while problem := get(url):
        if time.monotonic() + PAUSE_SECONDS > deadline:
            print(f"FAILED {name}: {url} {problem}", flush=True)  # noqa: T201
            return False
        time.sleep(PAUSE_SECONDS)
    print(f"ok {name}", flush=True)  # noqa: T201
    return True


def main() -> int:
    deadline = time.monotonic() + DEADLINE_SECONDS
    wanted = [argument.partition("=") for argument in sys.argv[1:]]
    results = [check(name, url, deadline) for name, _, url in wanted]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
