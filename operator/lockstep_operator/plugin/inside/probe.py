"""Inside a group's first pod: its status, and its metrics twice, as one JSON document.

Arguments: seconds between the two looks at the metrics; 0 for one look.
"""

import json
import os
import sys
import time
import urllib.request


def get(port: int, path: str, token: str = "") -> str:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://localhost:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        text: str = answer.read().decode()
        return text


def main() -> None:
    apart = float(sys.argv[1])
    first, began = get(8000, "/metrics"), time.monotonic()
    time.sleep(apart)
    second, seconds = get(8000, "/metrics") if apart else first, time.monotonic() - began
    status = json.loads(get(7401, "/status", os.environ["LOCKSTEP_TOKEN"]))
    print(json.dumps({"metrics": [first, second], "seconds": seconds, "status": status}))  # noqa: T201


if __name__ == "__main__":
    main()
