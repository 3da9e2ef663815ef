"""`lockstep report`: what a report of a fault needs, on stdout or in a file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import click

from lockstep_runtime.config import TOKEN_VARIABLE
from lockstep_runtime.host import discovery
from lockstep_runtime.host.addresses import join, loopback
from lockstep_runtime.protocol.status import STATUS_PORT
from lockstep_runtime.redaction import redactor
from lockstep_runtime.report import group, known_secrets, log_lines
from lockstep_runtime.report.group import GroupFacts
from lockstep_runtime.report.report import write


@click.command(
    "report",
    short_help="write what a bug report needs",
    epilog=f"The group's token is read from {TOKEN_VARIABLE}; a pod has it.",
)
@click.option("--url", help="of the leader's status port; default: of the one that serves on this machine")
@click.option("--log", metavar="FILE", help="the group's log, - for stdin: its lines about faults are taken")
@click.option("--output", metavar="FILE", help="default: stdout")
@click.pass_context
def command(ctx: click.Context, /, url: str | None, log: str | None, output: str | None) -> None:
    """Write what a bug report needs: versions, the machine, the group's settings, status and faults.

    Secrets are left out. Where several serve on this machine, --url chooses one. A group that doesn't answer is a line
    of the report, and no failure.
    """
    try:
        with _opened(log) as lines:
            text = report(os.environ, url=url, log=lines)
        if output:
            Path(output).write_text(text)
        else:
            sys.stdout.write(text)
    except OSError as error:
        click.echo(f"lockstep: {error.filename}: {error.strerror}", err=True)
        ctx.exit(1)


def report(environment: Mapping[str, str], *, url: str | None = None, log: Iterable[str] | None = None) -> str:
    """The report on the group at `url`, or on the only one that serves on this machine."""
    serving = discovery.found()
    in_pod = f"http://{join(loopback(), STATUS_PORT)}"
    url, problem = (url, "") if url else discovery.choose(serving, in_pod)
    token = environment.get(TOKEN_VARIABLE) or discovery.token_of(url, serving)
    facts = GroupFacts(problems=(problem,)) if problem else group.ask(url, token)
    redact = redactor(known_secrets.known(environment) | {one.token for one in serving if one.token})
    return write(facts, environment, redact, log=log, now=time.time())


@contextlib.contextmanager
def _opened(log: str | None) -> Iterator[Iterable[str] | None]:
    if log is None:
        yield None
    elif log == "-":
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        yield log_lines.read(sys.stdin)
    else:
        with Path(log).open(errors="replace") as file:
            yield log_lines.read(file)
