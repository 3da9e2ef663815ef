"""The host's side of the cluster's network: an interface that carries the node's address, forwarding, and masquerading.

The interface is a bridge without ports, because every kernel has bridges; it carries no traffic of pods.
"""

import json
import subprocess
from pathlib import Path

from dev.cluster.layout import INTERFACE, NETWORK, NODE_ADDRESS, POD_CIDR, RUN, SERVICE_CIDR
from dev.cluster.progress import Failure

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
FORWARDING_BEFORE = RUN / "ip_forward.before"


def set_up() -> None:
    run("ip", "link", "add", INTERFACE, "type", "bridge")
    run("ip", "address", "add", f"{NODE_ADDRESS}/32", "dev", INTERFACE)
    run("ip", "link", "set", INTERFACE, "up")
    # Without a route of their own, Services would be unreachable on a machine that has no default route.
    run("ip", "route", "add", SERVICE_CIDR, "dev", INTERFACE, "src", NODE_ADDRESS)
    FORWARDING_BEFORE.write_text(FORWARDING.read_text())
    FORWARDING.write_text("1")
    subprocess.run(["nft", "-f", "-"], input=masquerading(), text=True, check=True)


def masquerading() -> str:
    """What pods send beyond the cluster leaves under the machine's own address."""
    return f"""\
table ip lockstep {{
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        ip saddr {POD_CIDR} ip daddr != {NETWORK} masquerade
    }}
}}
"""


def restore_forwarding() -> None:
    if FORWARDING_BEFORE.exists():
        FORWARDING.write_text(FORWARDING_BEFORE.read_text())


def foreign_route() -> str | None:
    """A route of someone else's into the cluster's network, which would make the two fight over it."""
    routes = json.loads(run("ip", "-json", "route", "show", "root", NETWORK) or "[]")
    return next((f"{route['dst']} dev {route['dev']}" for route in routes if route.get("dev") != INTERFACE), None)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout
