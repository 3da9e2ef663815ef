"""python3 -m dev.cluster up | down | status | leftovers | purge | images"""

import argparse
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Final

from dev.cluster import images, lifecycle, traces
from dev.cluster.layout import DEV
from dev.cluster.progress import Failure, say

CHANGING: Final = ("up", "down", "purge", "images")


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.cluster", description="A real single-node Kubernetes on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start it; instant when it runs")
    commands.add_parser("down", help="stop it; images and binaries stay in .dev for the next time")
    commands.add_parser("status", help="its daemons and its node")
    commands.add_parser("images", help="build the operator's and the runtime's images and load them into the cluster")
    commands.add_parser("leftovers", help="list what a cluster has left on the machine; fails when there is something")
    commands.add_parser("purge", help="stop it and remove .dev")
    arguments = parser.parse_args()
    try:
        with _alone() if arguments.command in CHANGING else nullcontext():
            return _run(arguments.command)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1


@contextmanager
def _alone() -> Iterator[None]:
    """One command at a time may change the cluster; another waits."""
    DEV.mkdir(exist_ok=True)
    with (DEV / "cluster.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another command on the cluster")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: str) -> int:
    if command == "up":
        lifecycle.up()
    elif command == "down":
        lifecycle.down()
        say("the cluster is down")
    elif command == "purge":
        lifecycle.purge()
    elif command == "images":
        images.make()
    elif command == "status":
        print(lifecycle.status())
    elif command == "leftovers":
        found = traces.find_all()
        print("\n".join(found))
        return 1 if found else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
