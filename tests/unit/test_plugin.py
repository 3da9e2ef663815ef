"""`kubectl lockstep`, without a cluster: what it says of models, of changes, and of game days."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from click.testing import CliRunner
from tests.support.chart import ROOT
from tests.support.kube_world import World, well

from lockstep_operator.plugin import cli, cluster_report, top
from lockstep_operator.plugin.advice import advice
from lockstep_operator.plugin.asking import Answer, Probe, allows_faults, samples
from lockstep_operator.plugin.gameday import Blow, blows, copied, difference, gameday, judge
from lockstep_operator.plugin.session import PluginError, Session
from lockstep_operator.plugin.shadow import GAMEDAY_LABEL, shadow
from lockstep_operator.plugin.status import detail, overview, report
from lockstep_operator.types.names import (
    KIND,
    ModelKey,
)
from lockstep_operator.types.observed import GroupReport, Object
from lockstep_operator.types.reasons import Reason
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState, Latency
from lockstep_runtime.redaction import redactor


def live(world: World, key: ModelKey) -> Object:
    return world.kube.objects[KIND, key.namespace, key.name]


async def serving(**spec: Any) -> tuple[World, ModelKey]:
    world = World()
    key = world.add(**spec)
    await world.settle(key)
    return world, key


# --- status ----------------------------------------------------------------------------------------------------------


async def test_a_model_that_serves_has_nothing_wrong() -> None:
    world, key = await serving(replicas=2)
    seen = report(live(world, key))
    assert (seen.ready, seen.ready_groups, seen.replicas, seen.problems) == (True, 2, 2, [])
    [head, line] = overview([seen]).splitlines()
    assert head.split()[:4] == ["MODEL", "GROUPS", "RANKS", "READY"]
    assert line.split()[:4] == ["chat", "2/2", "4/4", "True"]
    rows = detail(seen, 2).splitlines()[2:]
    assert [row.split()[:3] for row in rows[1:4]] == [["0", "2/2", "ranks"], ["0", "0", "Ready"], ["0", "1", "Ready"]]


async def test_what_is_wrong_comes_with_what_to_do() -> None:
    world, key = await serving()
    fault = FaultRecord(id=1, fault=Fault.HANG, rank=1, message="rank 1 stopped", at=world.time, epoch=1)
    said = msgspec.structs.replace(
        well(key, 0, "inc", "rev"), state=GroupState.POISONED, since=world.time, faults=[fault], accepting=False
    )
    world.groups.said[key, 0] = GroupReport(status=said)
    await world.reconcile(key)
    seen = report(live(world, key))
    assert not seen.ready
    words = detail(seen, 2)
    assert "rank 1 stopped" in words
    assert f"if it recurs: {advice(Fault.HANG)}" in words


async def test_the_receipts_are_shown() -> None:
    world, key = await serving()
    saved = {"faults": 3, "requests": 5, "pausedSeconds": 4.25, "restartSeconds": 24.0, "restartsMeasured": 2}
    live(world, key)["status"]["savings"] = saved
    assert detail(report(live(world, key)), 2).splitlines()[-1] == (
        "healed in place so far: 3 faults, 5 requests kept, 4.2 s of pauses; restarts would have cost 24 s (2 measured)"
    )


async def test_a_spec_that_nobody_has_looked_at_is_not_ready() -> None:
    world, key = await serving()
    world.edit(key, dtype="bfloat16")
    seen = report(live(world, key))
    assert (seen.ready, seen.reason) == (False, "NotSeen")


async def test_programs_get_the_same_as_json() -> None:
    world, key = await serving()
    document = json.loads(json.dumps(report(live(world, key)).document()))
    assert (document["name"], document["ready"], document["groups"][0]["state"]) == ("chat", True, "Ready")


def test_what_troubleshooting_says_to_do_is_what_the_plugin_says() -> None:
    section = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## The model is not Ready")[2]
    listed = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    reasons = [line.split("`")[1] for line in listed]
    assert {Reason.UNSCHEDULABLE, Reason.POISONED, Reason.NAME_CONFLICT} <= set(reasons)
    assert [reason for reason in reasons if not advice(reason)] == []
    assert [fault for fault in Fault if not advice(fault)] == []
    assert "](" not in advice(Reason.LOADING)


# --- top, inject, report ---------------------------------------------------------------------------------------------


def test_metrics_are_summed_over_labels() -> None:
    text = '# HELP a b\na_total{x="1"} 2.0\na_total{x="2 3"} 3.5\nb 1e3\n'
    assert samples(text) == {"a_total": 5.5, "b": 1000.0}


def test_a_group_at_work_and_one_that_does_not_answer() -> None:
    status = well(ModelKey("team", "chat"), 0, "inc", "rev")
    ranks = [
        msgspec.structs.replace(rank, step_latency=Latency(p50_ms=5.0 + rank.rank, p99_ms=9.0)) for rank in status.ranks
    ]
    status = msgspec.structs.replace(status, step_latency=Latency(p50_ms=6.0, p99_ms=9.0), ranks=ranks, recoveries=2)
    metrics = {"lockstep_num_requests_running": 3.0, "lockstep_kv_cache_usage_ratio": 0.25}
    found = top.text({("chat", 0): Probe(status, metrics, 41.26), ("chat", 1): "no answer"}).splitlines()
    assert found[1].split() == ["chat", "0", "Ready", "2/2", "3", "0", "41.3", "25%", "6.0ms", "9.0ms", "2"]
    assert found[2].split() == ["chat", "1", "no", "answer"]
    assert top.document(Probe(status, metrics, 41.26))["slowestRank"] == 1
    assert top.document("no answer") == {"error": "no answer"}


def test_faults_are_taken_where_the_variable_says_so() -> None:
    def pod(*env: Object) -> Object:
        return {"spec": {"containers": [{"name": "sidecar"}, {"name": "lockstep", "env": [*env]}]}}

    assert allows_faults(pod({"name": "LOCKSTEP_ALLOW_FAULTS", "value": "true"}))
    assert not allows_faults(pod({"name": "LOCKSTEP_ALLOW_FAULTS", "value": "false"}))
    assert not allows_faults(pod())


def test_a_report_has_no_secrets() -> None:
    env = [{"name": "HF_TOKEN", "value": "plain-word"}, {"name": "NCCL_DEBUG", "value": "INFO"}]
    containers = [{"name": "lockstep", "env": env, "args": ["--x=hf_abcdefghijklmnopqrstuv"]}]
    model = {
        "metadata": {"name": "chat", "namespace": "team", "uid": "u", "generation": 1, "creationTimestamp": "2030"},
        "spec": {"template": {"spec": {"containers": containers}}},
        "status": {"ranks": "2/2"},
    }
    event = {
        "metadata": {"creationTimestamp": "2030-01-01T00:00:00Z"}, "type": "Warning", "reason": "Hang",
        "message": "token=abcdef0123", "involvedObject": {"kind": KIND, "name": "chat"},
    }  # fmt: skip
    found = cluster_report.write(model, [], [event], redactor(()))
    assert "plain-word" not in found
    assert "hf_abcdef" not in found
    assert "abcdef0123" not in found
    assert "INFO" in found
    assert "2/2" in found
    assert f"{KIND}/chat Hang: token=" in found


# --- game days -------------------------------------------------------------------------------------------------------


def answer(text: str = "one two three", **fields: Any) -> Answer:
    defaults: dict[str, Any] = {"text": text, "finish": "length", "error": "", "pause": 0.1}
    return Answer(**(defaults | fields))


def record(**fields: Any) -> FaultRecord:
    defaults: dict[str, Any] = {
        "id": 4, "fault": Fault.HANG, "rank": 1, "message": "stopped", "at": 5.0, "epoch": 1, "rung": "Respawn",
        "recovered_at": 6.0,
    }  # fmt: skip
    return FaultRecord(**(defaults | fields))


HANG = Blow(injection="hang", rank=1, expected=Fault.HANG)


def test_the_same_answers_after_the_right_fault_are_a_proof() -> None:
    proof = judge(HANG, [answer()], [answer(pause=2.2)], record())
    assert (proof.problems, proof.pause) == ([], 2.2)


@pytest.mark.parametrize(
    ("broken", "fault", "words"),
    [
        (answer("one two"), record(), "differs from letter 8 on"),
        (answer("one twx three"), record(), "differs from letter 7 on"),
        (answer(finish=""), record(), "ended with nothing instead of length"),
        (answer(error="503: away"), record(), "a request failed: 503: away"),
        (answer(), None, "nothing is proved"),
        (answer(), record(rank=0), "calls it Hang of rank 0"),
        (answer(), record(fault=Fault.RANK_LOST), "calls it RankLost of rank 1"),
        (answer(), record(recovered_at=None), "has not recovered"),
    ],
)
def test_anything_else_is_none(broken: Answer, fault: FaultRecord | None, words: str) -> None:
    assert words in "; ".join(judge(HANG, [answer()], [broken], fault).problems)


def test_the_same_text_is_no_difference() -> None:
    assert difference(answer(), answer(pause=9.0)) == ""


def test_two_ranks_suffer_or_the_only_one_twice() -> None:
    assert [(blow.injection, blow.rank) for blow in blows(4)] == [("hang", 3), ("sigkill", 0)]
    assert {blow.rank for blow in blows(1)} == {0}


def test_the_copy_is_one_group_of_the_same_spec_that_takes_faults() -> None:
    env = [{"name": "A", "value": "b"}, {"name": "LOCKSTEP_ALLOW_FAULTS", "value": "false"}]
    spec = {
        "model": {"hostPath": {"path": "/m"}},
        "tensorParallelSize": 2,
        "replicas": 7,
        "rollout": {"maxUnavailable": 2},
        "apiKeySecretRef": {"name": "k", "key": "k"},
        "template": {
            "metadata": {"labels": {"a": "b"}},
            "spec": {
                "terminationGracePeriodSeconds": None,
                "containers": [{"name": "sidecar"}, {"name": "lockstep", "env": env}],
            },
        },
    }
    name = "a-model-with-a-name-of-forty-characters-"
    copy = shadow(
        {"metadata": {"name": f"{name}x"[:40], "namespace": "team", "labels": {"app": "x"}}, "spec": spec}, "ab12"
    )
    assert len(copy["metadata"]["name"]) <= 40
    assert copy["metadata"]["name"].endswith("-gameday-ab12")
    assert [*copy["metadata"]["labels"]] == [GAMEDAY_LABEL]
    made = copy["spec"]
    assert (made["replicas"], "rollout" in made, made["apiKeySecretRef"]) == (1, False, {"name": "k", "key": "k"})
    assert made["model"]["servedName"] == f"{name}x"[:40]
    pod = made["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] is None, "what the user removes stays removed"
    assert pod["containers"][1]["env"] == [env[0], {"name": "LOCKSTEP_ALLOW_FAULTS", "value": "true"}]
    assert spec["replicas"] == 7, "the model's own spec is left alone"


@dataclass(frozen=True, slots=True)
class Played(Session):
    """A cluster in memory whose groups do what they are told."""

    commands: list[Sequence[str]] = field(default_factory=list)
    answers: Callable[[int], list[Answer]] = lambda number: [answer()]
    faults: list[FaultRecord] = field(default_factory=list)

    async def execute(self, pod: str, command: Sequence[str], seconds: float = 0) -> str:
        self.commands.append(command)
        if command[:2] == ["lockstep", "inject"]:
            kind, rank = command[2], int(command[3].partition("=")[2])
            fault = {"hang": Fault.HANG, "sigkill": Fault.RANK_LOST}[kind]
            self.faults.append(record(id=len(self.faults) + 1, fault=fault, rank=rank))
            return "injected"
        if "class Reader" in command[2]:
            streamed = sum("class Reader" in one[2] for one in self.commands if one[0] == "python3")
            return json.dumps([{f: getattr(one, f) for f in one.__slots__} for one in self.answers(streamed)])
        status = msgspec.structs.replace(well(ModelKey("team", "chat"), 0, "inc", "rev"), faults=[*self.faults])
        return json.dumps({"metrics": ["", ""], "seconds": 1.0, "status": msgspec.to_builtins(status)})


async def play(played: Played, world: World, copy: Object, said: list[str]) -> bool:
    """The game day, while the operator and the cluster do their part."""
    key = ModelKey(copy["metadata"]["namespace"], copy["metadata"]["name"])

    async def everybody_else() -> None:
        while True:
            await world.reconcile(key)
            for step in world.kube.steps(world.broken):
                step()
            world.time += 1
            await asyncio.sleep(0.001)

    others = asyncio.create_task(everybody_else())
    try:
        return await gameday(played, copy, said.append, tokens=32, seconds=20)
    finally:
        others.cancel()


async def made() -> tuple[World, Object]:
    world, key = await serving()
    return world, shadow(live(world, key), "ab12")


def played(world: World, **fields: Any) -> Played:
    return Played(kube=cast(Any, world.kube), api=cast(Any, None), namespace="team", **fields)


async def test_a_game_day_breaks_a_copy_and_leaves_nothing() -> None:
    world, copy = await made()
    said: list[str] = []
    one = played(world)
    assert await play(one, world, copy, said), said
    injected = [tuple(command[2:]) for command in one.commands if command[0] == "lockstep"]
    assert injected == [
        ("hang", "--rank=1", "--phase=decode", "--skip=8"),
        ("sigkill", "--rank=0", "--phase=decode", "--skip=8"),
    ]
    assert [item["metadata"]["name"] for item in world.kube.of_kind(KIND)] == ["chat"]
    assert "the same answers letter for letter" in said[-2]
    assert said[-1] == f"removed {copy['metadata']['name']}"


async def test_a_game_day_that_fails_says_so_and_leaves_nothing() -> None:
    world, copy = await made()
    said: list[str] = []
    one = played(world, answers=lambda number: [answer("one two three" if number < 3 else "one two four")])
    assert not await play(one, world, copy, said)
    assert any(words.startswith("FAILED: the process of rank 0 was killed") for words in said)
    assert [item["metadata"]["name"] for item in world.kube.of_kind(KIND)] == ["chat"]


async def test_a_copy_is_removed_when_the_game_day_is_interrupted() -> None:
    world, copy = await made()
    inside = asyncio.Event()

    async def day() -> None:
        async with copied(played(world), copy, lambda words: None):
            inside.set()
            await asyncio.sleep(3600)

    task = asyncio.create_task(day())
    await asyncio.wait_for(inside.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [item["metadata"]["name"] for item in world.kube.of_kind(KIND)] == ["chat"]


async def test_a_copy_that_the_api_server_refuses_is_told_in_its_words() -> None:
    world, copy = await made()
    world.kube.quotas[KIND] = 1
    with pytest.raises(PluginError, match=r"refuses team/chat-gameday-ab12: .*exceeded quota"):
        await gameday(played(world), copy, lambda words: None, tokens=32, seconds=5)


# --- the command line ------------------------------------------------------------------------------------------------


def test_what_can_not_work_is_one_sentence(tmp_path: Path) -> None:
    run = CliRunner().invoke
    missing = str(tmp_path / "kubeconfig")
    found = run(cli.main, ["status", "--kubeconfig", missing])
    assert (found.exit_code, found.output.startswith("Error: no cluster to ask: ")) == (1, True), found.output
    (tmp_path / "empty.yaml").write_text("kind: ConfigMap\n")
    both = run(cli.main, ["gameday"])
    assert both.exit_code == 2
    assert "name a model, or a file with one" in both.output
