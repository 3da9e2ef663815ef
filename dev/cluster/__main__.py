"""python3 -m dev.cluster up | down | status | leftovers | purge | images"""

import argparse
import sys

from dev.cluster import images, lifecycle, traces
from dev.cluster.progress import Failure, say


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
        return _run(arguments.command)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1


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
