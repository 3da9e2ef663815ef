"""`kubectl lockstep gameday`: breaks the ranks of a copy of a model while it streams, and proves the answers.

The copy is removed whatever happens, a signal included; only a plugin that is killed outright leaves it (label
lockstep.dev/gameday).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.plugin import asking
from lockstep_operator.plugin.asking import Answer
from lockstep_operator.plugin.session import PluginError, Session
from lockstep_operator.plugin.status import report
from lockstep_operator.types.names import KIND, selector
from lockstep_operator.types.observed import Object
from lockstep_operator.types.reasons import ConditionType
from lockstep_runtime.protocol.status import Fault, FaultRecord

LOOK_SECONDS: Final = 0.5
GONE_SECONDS: Final = 120.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """A fault on purpose, and what the group must call it."""

    injection: str
    rank: int
    expected: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What came of one blow. `problems` is empty when clients noticed a pause and nothing else. `pause`: the longest,
    in seconds."""

    blow: Blow
    pause: float
    fault: FaultRecord | None
    problems: Sequence[str]


def blows(size: int) -> list[Blow]:
    """One rank hangs and the process of another is killed; a single rank suffers both."""
    return [
        Blow(injection="hang", rank=size - 1, expected=Fault.HANG),
        Blow(injection="sigkill", rank=0, expected=Fault.RANK_LOST),
    ]


def judge(blow: Blow, whole: Sequence[Answer], broken: Sequence[Answer], fault: FaultRecord | None) -> Proof:
    """`whole` are the answers that nobody disturbed, `fault` is the newest that the group has recorded since."""
    problems = [words for one, other in zip(whole, broken, strict=True) if (words := difference(one, other))]
    if fault is None:
        problems.append("the group has recorded no fault, so nothing is proved")
    elif (fault.fault, fault.rank) != (blow.expected, blow.rank):
        problems.append(f"the group calls it {fault.fault} of rank {fault.rank}: {fault.message}")
    elif fault.recovered_at is None:
        problems.append(f"the group has not recovered from {fault.fault} of rank {fault.rank}")
    return Proof(blow=blow, pause=max(one.pause for one in broken), fault=fault, problems=problems)


def difference(whole: Answer, broken: Answer) -> str:
    """What a client would have noticed, besides a pause."""
    if broken.error:
        return f"a request failed: {broken.error}"
    if broken.text == whole.text and broken.finish == whole.finish:
        return ""
    pairs = enumerate(zip(whole.text, broken.text, strict=False))
    at = next((place for place, (one, other) in pairs if one != other), min(len(whole.text), len(broken.text)))
    context = slice(max(0, at - 20), at + 20)
    return (
        f"an answer differs from letter {at + 1} on ({broken.text[context]!r} instead of {whole.text[context]!r}), "
        f"and ended with {broken.finish or 'nothing'} instead of {whole.finish or 'nothing'}"
    )


async def gameday(session: Session, manifest: Object, say: Say, *, tokens: int, seconds: float) -> bool:
    """Whether every answer came letter for letter. `seconds`: how long its start may take, and each stream."""
    name, size = manifest["metadata"]["name"], manifest["spec"]["tensorParallelSize"]
    async with copied(session, manifest, say):
        took = await until_ready(session, name, say, seconds)
        say(f"{name} is Ready after {took:.1f} s: one group of {size} rank{'s' * (size > 1)}")
        pod = asking.name_of(await asking.leader_of(session, name, 0))
        served = manifest["spec"]["model"].get("servedName") or name
        whole = await asking.stream(session, pod, served, tokens, seconds)
        if problem := next((one.error for one in whole if one.error), ""):
            raise PluginError(f"it can't be asked: {problem}")
        say(f"asked undisturbed: {len(whole)} answers of {tokens} tokens, longest pause {_longest(whole)}")
        proofs = [await _suffer(session, pod, served, blow, whole, seconds, tokens) for blow in blows(size)]
        for proof in proofs:
            say(_sentence(proof))
    return not any(proof.problems for proof in proofs)


async def _suffer(
    session: Session, pod: str, served: str, blow: Blow, whole: Sequence[Answer], seconds: float, tokens: int
) -> Proof:
    before = (await asking.probe(session, pod, 0)).status
    known = max((fault.id for fault in before.faults), default=0)
    await asking.inject(session, pod, blow.injection, blow.rank, ["--phase=decode", f"--skip={tokens // 4}"])
    broken = await asking.stream(session, pod, served, tokens, seconds)
    after = (await asking.probe(session, pod, 0)).status
    new = [fault for fault in after.faults if fault.id > known]
    return judge(blow, whole, broken, max(new, key=lambda fault: fault.id, default=None))


def _sentence(proof: Proof) -> str:
    blow = proof.blow
    what = {"hang": f"rank {blow.rank} hung", "sigkill": f"the process of rank {blow.rank} was killed"}[blow.injection]
    if proof.problems:
        return f"FAILED: {what} while it streamed: {'; '.join(proof.problems)}"
    resumed = proof.fault.requests_resumed if proof.fault else 0
    rung = proof.fault.rung if proof.fault else ""
    return (
        f"{what} while it streamed: repaired by {rung}, {resumed} requests resumed, longest pause {proof.pause:.2f} s, "
        "the same answers letter for letter"
    )


def _longest(answers: Sequence[Answer]) -> str:
    return f"{max(one.pause for one in answers):.2f} s"


@asynccontextmanager
async def copied(session: Session, manifest: Object, say: Say) -> AsyncIterator[None]:
    """The model exists inside, and nothing of it afterwards."""
    name, namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    try:
        made = await session.kube.create(KIND, manifest)
    except KubeError as error:
        raise PluginError(f"the API server refuses {namespace}/{name}: {error.message}") from error
    say(f"made {namespace}/{name}, which is removed in the end")
    try:
        yield
    finally:
        await asyncio.shield(_remove(session, namespace, name, made["metadata"]["uid"]))
        say(f"removed {name}")


async def _remove(session: Session, namespace: str, name: str, uid: str) -> None:
    """Raises PluginError when its pods don't end."""
    await session.kube.delete(KIND, namespace, name, uid)
    deadline = time.monotonic() + GONE_SECONDS
    while await session.kube.find("Pod", namespace, labels=selector(name)):
        if time.monotonic() > deadline:
            raise PluginError(f"{namespace}/{name} is deleted, but its pods have not ended within {GONE_SECONDS:g} s")
        await asyncio.sleep(LOOK_SECONDS)


async def until_ready(session: Session, name: str, say: Say, seconds: float) -> float:
    """Seconds that it took. Raises PluginError when it gets stuck or takes too long."""
    began, told = time.monotonic(), ""
    while True:
        seen = report(await session.model(name))
        if seen.ready:
            return time.monotonic() - began
        sentence = f"{seen.reason}: {seen.message}"
        if seen.status.is_true(ConditionType.STALLED):
            raise PluginError(f"{name} can't become Ready: {sentence}")
        if time.monotonic() - began > seconds:
            raise PluginError(f"{name} is not Ready after {seconds:g} s: {sentence}")
        if sentence != told:
            say(f"  {sentence}")
            told = sentence
        await asyncio.sleep(LOOK_SECONDS)
