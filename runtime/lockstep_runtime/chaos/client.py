"""`lockstep inject`: ask a group that was started with `--allow-faults` for a fault."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from typing import Any

import click
import msgspec

from lockstep_runtime.config import TOKEN_VARIABLE
from lockstep_runtime.host import discovery
from lockstep_runtime.host.addresses import join, loopback
from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Inject, Injection
from lockstep_runtime.protocol.status import STATUS_PORT
from lockstep_runtime.protocol.tokens import Purpose, purpose_token


@click.command(
    short_help="make a rank fail, to see the group heal", epilog=f"The group's token is read from {TOKEN_VARIABLE}."
)
@click.argument("kind", metavar="FAULT", type=click.Choice([kind.value for kind in Injection]))
@click.option("--rank", type=int, required=True)
@click.option(
    "--phase",
    type=click.Choice([phase.value for phase in FaultPhase]),
    default=FaultPhase.NOW.value,
    show_default=True,
    help="when it acts",
)
@click.option(
    "--at",
    type=click.Choice([point.value for point in CollectivePoint]),
    default=CollectivePoint.BEFORE.value,
    show_default=True,
    help="seen from the collective",
)
@click.option("--place", default="", help="of the collective, such as layers.2.mlp; default: the first")
@click.option("--skip", type=int, default=0, help="steps of that phase that pass unharmed first")
@click.option("--seconds", type=float, default=0.1, show_default=True, help="slow: by how much")
@click.option("--times", type=int, default=1, show_default=True, help="slow: for how many steps")
@click.option("--number", type=int, default=0, help="flip-bit: which bit")
@click.option("--url", help="of the leader's status port; default: of the one that serves on this machine")
@click.pass_context
def inject(ctx: click.Context, /, url: str | None, **options: Any) -> None:
    fault = msgspec.convert(options, Inject)
    serving = discovery.found()
    in_pod = f"http://{join(loopback(), STATUS_PORT)}"
    url, problem = (url, "") if url else discovery.choose([one for one in serving if one.faults], in_pod)
    if problem := problem or send(url, os.environ.get(TOKEN_VARIABLE) or discovery.token_of(url, serving), fault):
        click.echo(f"lockstep: {problem}", err=True)
        ctx.exit(1)
    click.echo(f"inject: {fault.kind} on rank {fault.rank}, {fault.phase}")


inject.help = f"""Make a rank of a group fail that was started with --allow-faults, to see the group heal.

FAULT is one of {", ".join(Injection)}. device-assert and illegal-access break the CUDA context of a rank's GPU; without
one they are refused.
"""


def send(url: str, token: str, fault: Inject) -> str:
    """Ask for the fault; what is wrong, or nothing."""
    headers = {"Authorization": f"Bearer {purpose_token(token, Purpose.FAULTS)}"}
    request = urllib.request.Request(  # noqa: S310 - the user's own server
        f"{url}/inject", data=msgspec.json.encode(fault), headers=headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=10):  # noqa: S310
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode(errors="replace").strip() or f"the group answered {error.code}"
    except OSError as error:
        return f"no answer from {url}: {error}"
