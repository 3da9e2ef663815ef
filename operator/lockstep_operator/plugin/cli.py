"""The command line of `kubectl lockstep`."""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import yaml

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.plugin import asking, cluster_report, plan, shadow, status, top
from lockstep_operator.plugin.gameday import gameday as run_gameday
from lockstep_operator.plugin.session import PluginError, Session, connected
from lockstep_operator.types.names import KIND, selector
from lockstep_operator.types.observed import Object
from lockstep_operator.types.spec_values import SpecError
from lockstep_runtime.redaction import redactor

_JSON: Final = click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
_GROUP: Final = click.option("--group", type=click.IntRange(0), default=0, show_default=True)
_RANK: Final = click.option("--rank", type=click.IntRange(0), required=True)


Work = Callable[[Session], Coroutine[Any, Any, bool]]  # true: all is well


@dataclass(frozen=True, slots=True)
class Where:
    kubeconfig: str | None
    context: str | None
    namespace: str | None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lockstep")
def main() -> None:
    """Ask and test the TensorParallelModels of a cluster."""


def command(name: str, **settings: Any) -> Callable[[Callable[..., Work]], click.Command]:
    """A command whose function returns what is to be done; with kubectl's options, which stand behind the command."""

    def made(function: Callable[..., Work]) -> click.Command:
        @click.option("--kubeconfig", help="default: as kubectl's")
        @click.option("--context", help="of the kubeconfig")
        @click.option("-n", "--namespace", help="default: the context's")
        @functools.wraps(function)
        def run(kubeconfig: str | None, context: str | None, namespace: str | None, **given: Any) -> None:
            _run(Where(kubeconfig, context, namespace), function(**given))

        return main.command(name, **settings)(run)

    return made


def _run(where: Where, work: Work) -> None:
    """Exits with 0 when the answer is true, with 1 when it is false or can't be had. A signal ends the work, which may
    clean up."""
    try:
        well = asyncio.run(_interruptible(where, work))
    except (PluginError, SpecError) as error:
        raise click.ClickException(str(error)) from error
    except KubeError as error:
        raise click.ClickException(f"the API server says {error}") from error
    sys.exit(0 if well else 1)


async def _interruptible(where: Where, work: Work) -> bool:
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with connected(where.kubeconfig, where.context, where.namespace) as session:
            return await work(session)
    except asyncio.CancelledError:
        raise PluginError("interrupted") from None


@command("status")
@click.argument("model", required=False)
@_JSON
def status_(model: str | None, output: str) -> Work:
    """What is wrong with MODEL (or with each model of the namespace), and what to do about it.

    Exits with 0 when everything asked about is Ready, else with 1.
    """

    async def work(session: Session) -> bool:
        found = [await session.model(model)] if model else await session.kube.find(KIND, session.namespace)
        reports = [status.report(one) for one in found]
        if output == "json":
            click.echo(json.dumps([one.document() for one in reports], indent=2))
        elif model:
            click.echo(status.detail(reports[0], found[0]["spec"]["tensorParallelSize"]))
        else:
            click.echo(status.overview(reports) if reports else f"no model in namespace {session.namespace}")
        return all(one.ready for one in reports)

    return work


@command("plan")
@click.option("-f", "--filename", required=True, help="a manifest; - for stdin")
def plan_(filename: str) -> Work:
    """What applying FILE would do: which groups restart, why, in what order, for how long; and what would be refused.

    Nothing is changed. The file is taken as the models' whole spec; `replicas` stays where the file has none. Exits
    with 1 when something would be refused.
    """

    async def work(session: Session) -> bool:
        return all([await _planned(session, one) for one in _models(filename)])

    return work


async def _planned(session: Session, manifest: Object) -> bool:
    manifest = {**manifest, "metadata": {"namespace": session.namespace, **manifest["metadata"]}}
    name, namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    live = await session.kube.get(KIND, namespace, name)
    try:
        wanted = await session.try_model(plan.with_kept(manifest, live), live)
    except KubeError as error:
        click.echo(f"{name}: the API server refuses it: {error.message}")
        return False
    kinds = ("StatefulSet", "Pod", "ControllerRevision") if live else ()
    lists = [await session.kube.find(kind, namespace, labels=selector(name)) for kind in kinds]
    objects = [item for items in lists for item in items]
    found = plan.plan(live, wanted, objects)
    click.echo(plan.text(found))
    return not found.flaw and await _pods_taken(session, wanted, objects)


async def _pods_taken(session: Session, wanted: Object, objects: Sequence[Object]) -> bool:
    model = plan.understood(wanted)
    try:
        await session.try_pod(plan.pod_manifest(model, objects))
    except KubeError as error:
        if error.status == 403 and "cannot create resource" in error.message:
            click.echo(f"{model.name}: whether its pods would be taken isn't known: you may not create pods there")
            return True
        click.echo(f"{model.name}: the API server refuses its pods: {error.message}")
        return False
    return True


def _models(filename: str) -> list[Object]:
    """Raises PluginError when the file has none."""
    try:
        text = sys.stdin.read() if filename == "-" else Path(filename).read_text()
        found = [one for one in yaml.safe_load_all(text) if isinstance(one, dict) and one.get("kind") == KIND]
    except (OSError, yaml.YAMLError) as error:
        raise click.ClickException(f"{filename} can't be read: {error}") from error
    if not found or not all("name" in (one.get("metadata") or {}) and "spec" in one for one in found):
        raise click.ClickException(f"{filename} has no {KIND} with a name and a spec")
    return found


@command("top")
@click.argument("model", required=False)
@_JSON
def top_(model: str | None, output: str) -> Work:
    """What each group does just now: requests, tokens per second, KV cache, step latency, ranks."""

    async def work(session: Session) -> bool:
        names = (
            [model] if model else [one["metadata"]["name"] for one in await session.kube.find(KIND, session.namespace)]
        )
        if model:
            await session.model(model)
        found = {key: one for name in names for key, one in (await _probes(session, name)).items()}
        if output == "json":
            click.echo(json.dumps({f"{name}/{number}": top.document(one) for (name, number), one in found.items()}))
        else:
            click.echo(top.text(found))
        return not any(isinstance(one, str) for one in found.values())

    return work


async def _probes(session: Session, model: str) -> dict[tuple[str, int], asking.Probe | str]:
    pods = await asking.leaders(session, model)
    found = await asyncio.gather(*(_probe(session, asking.name_of(pod)) for pod in pods.values()))
    return {(model, group): one for group, one in zip(pods, found, strict=True)}


async def _probe(session: Session, pod: str) -> asking.Probe | str:
    try:
        return await asking.probe(session, pod)
    except PluginError as error:
        return str(error)


@command("inject", context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("fault")
@_RANK
@_GROUP
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def inject(model: str, fault: str, rank: int, group: int, options: Sequence[str]) -> Work:
    """Do FAULT (hang, sigkill, nan, …) to a rank of a MODEL whose template allows it (LOCKSTEP_ALLOW_FAULTS).

    OPTIONS are those of `lockstep inject`, such as --phase=decode --skip=8.
    """

    async def work(session: Session) -> bool:
        await session.model(model)
        pod = await asking.leader_of(session, model, group)
        if not asking.allows_faults(pod):
            raise PluginError(
                f"{model} takes no faults on purpose: set {asking.ALLOWS_FAULTS}=true in its template's container, or "
                f"break a copy of it with `kubectl lockstep gameday {model}`"
            )
        click.echo(await asking.inject(session, asking.name_of(pod), fault, rank, options))
        return True

    return work


@command("report")
@click.argument("model")
@click.option("--output", metavar="FILE", help="default: stdout")
def report_(model: str, output: str | None) -> Work:
    """Write what a report of a fault needs: the model, its pods and Events, and each group's `lockstep report`.

    Secrets are left out.
    """

    async def work(session: Session) -> bool:
        found = await session.model(model)
        pods = await session.kube.find("Pod", session.namespace, labels=selector(model))
        names = {model, *(pod["metadata"]["name"] for pod in pods)}
        events = await session.kube.find("Event", session.namespace)
        about = [one for one in events if one["involvedObject"]["name"] in names]
        parts = [cluster_report.write(found, pods, about, redactor(()))]
        for group, pod in (await asking.leaders(session, model)).items():
            parts.append(f"## group {group}\n\n{await _own_report(session, asking.name_of(pod))}")
        with click.open_file(output or "-", "w") as file:
            file.write("\n".join(parts))
        return True

    return work


async def _own_report(session: Session, pod: str) -> str:
    try:
        return await session.execute(pod, ["lockstep", "report"])
    except PluginError as error:
        return f"{error}\n"


@command("gameday")
@click.argument("model", required=False)
@click.option("-f", "--filename", help="break a model made from this file instead; - for stdin")
@click.option("--tokens", type=click.IntRange(16), default=96, show_default=True, help="of each answer")
@click.option("--timeout", type=click.FloatRange(1), default=600, show_default=True, help="seconds to become Ready")
def gameday(model: str | None, filename: str | None, tokens: int, timeout: float) -> Work:
    """Break a copy of MODEL, one group under another name, and prove the answers letter for letter.

    One rank hangs and the process of another is killed while the copy streams. It needs the room of one group, and is
    removed in the end. Exits with 1 unless every answer came as it would have come undisturbed.
    """
    if (model is None) == (filename is None):
        raise click.UsageError("name a model, or a file with one")

    async def work(session: Session) -> bool:
        mark = secrets.token_hex(2)
        live = await session.model(model) if model else _models(filename or "")[0]
        here = {**live, "metadata": {"namespace": session.namespace, **live["metadata"]}}
        session = replace(session, namespace=here["metadata"]["namespace"])
        well = await run_gameday(session, shadow.shadow(here, mark), click.echo, tokens=tokens, seconds=timeout)
        click.echo("passed" if well else "FAILED")
        return well

    return work


if __name__ == "__main__":
    main()
