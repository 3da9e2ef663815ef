"""`lockstep inject`: ask a group that was started with `--allow-faults` for a fault."""

from __future__ import annotations

import argparse
import os
import sys
import urllib.error
import urllib.request
from typing import Any

import msgspec

from lockstep_runtime.config import TOKEN_VARIABLE
from lockstep_runtime.host import discovery
from lockstep_runtime.host.addresses import join, loopback
from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Inject, Injection
from lockstep_runtime.protocol.status import STATUS_PORT


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `lockstep`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inject",
        help="make a rank fail, to see the group heal",
        description="Make a rank of a group fail that was started with --allow-faults, to see the group heal. "
        "device-assert and illegal-access break the CUDA context of a rank's GPU; without one they are refused.",
        epilog=f"The group's token is read from {TOKEN_VARIABLE}.",
    )
    parser.add_argument("fault", choices=list(Injection), metavar="FAULT", help=", ".join(Injection))
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--phase", choices=list(FaultPhase), default=FaultPhase.NOW, help="when it acts (default: now)")
    parser.add_argument(
        "--at",
        choices=list(CollectivePoint),
        default=CollectivePoint.BEFORE,
        help="seen from the collective (default: before)",
    )
    parser.add_argument("--place", default="", help="of the collective, such as layers.2.mlp; default: the first")
    parser.add_argument("--skip", type=int, default=0, help="steps of that phase that pass unharmed first")
    parser.add_argument("--seconds", type=float, default=0.1, help="slow: by how much (default: 0.1)")
    parser.add_argument("--times", type=int, default=1, help="slow: for how many steps (default: 1)")
    parser.add_argument("--number", type=int, default=0, help="flip-bit: which bit")
    parser.add_argument("--url", help="of the leader's status port; default: of the one that serves on this machine")


def run(options: argparse.Namespace) -> int:
    """Send it; the exit code."""
    fault = Inject(
        rank=options.rank,
        kind=Injection(options.fault),
        phase=FaultPhase(options.phase),
        at=CollectivePoint(options.at),
        place=options.place,
        skip=options.skip,
        seconds=options.seconds,
        times=options.times,
        number=options.number,
    )
    serving = discovery.found()
    in_pod = f"http://{join(loopback(), STATUS_PORT)}"
    url, problem = (
        (options.url, "") if options.url else discovery.choose([one for one in serving if one.faults], in_pod)
    )
    token = os.environ.get(TOKEN_VARIABLE) or discovery.token_of(url, serving)
    if problem := problem or send(url, token, fault):
        print(f"lockstep: {problem}", file=sys.stderr)
        return 1
    print(f"inject: {fault.kind} on rank {fault.rank}, {fault.phase}")
    return 0


def send(url: str, token: str, fault: Inject) -> str:
    """Ask for the fault; what is wrong, or nothing."""
    request = urllib.request.Request(  # noqa: S310 - the user's own server
        f"{url}/inject", data=msgspec.json.encode(fault), headers={"Authorization": f"Bearer {token}"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=10):  # noqa: S310
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode(errors="replace").strip() or f"the group answered {error.code}"
    except OSError as error:
        return f"no answer from {url}: {error}"
