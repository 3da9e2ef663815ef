"""`kubectl lockstep` as people run it: the installed plugin, found by kubectl, on the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import breakable, read
from tests.support.cluster_load import Load
from tests.support.cluster_model import Model, Object, manifest
from tests.support.stream import answers


@pytest.fixture(scope="module")
def model(api: ClusterApi, new_namespace: Callable[[str], str]) -> Iterator[Model]:
    """One model for all tests: each leaves it Ready."""
    one = Model(api, new_namespace("plugin"), "told")
    one.apply(breakable())
    one.until_ready()
    yield one
    one.delete()


def lockstep(model: Model, *arguments: str, stdin: str | None = None, seconds: float = 60) -> tuple[int, str]:
    """Exit status and what was said, both streams together."""
    path = f"{Path(sys.executable).parent}:{kubectl.ROOT / '.dev' / 'bin'}:{os.environ['PATH']}"
    command, *rest = arguments
    done = subprocess.run(
        ["kubectl", "lockstep", command, "--namespace", model.namespace, *rest],
        env={**os.environ, "PATH": path, "KUBECONFIG": str(kubectl.KUBECONFIG)},
        input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def file_of(model: Model, **spec: Any) -> str:
    return yaml.safe_dump(manifest(model.namespace, model.name, breakable(**spec)))


def test_status_says_that_all_is_well(model: Model) -> None:
    code, said = lockstep(model, "status")
    assert (code, said.splitlines()[1].split()[:4]) == (0, ["told", "1/1", "2/2", "True"]), said
    code, said = lockstep(model, "status", "told", "-o", "json")
    [document] = json.loads(said)
    assert (code, document["ready"], document["problems"]) == (0, True, [])


def test_status_of_what_does_not_start_says_what_to_do_and_exits_with_1(model: Model) -> None:
    other = Model(model.api, model.namespace, "absent")
    other.apply(breakable(model={"hostPath": {"path": "/nowhere/at/all"}}))
    other.until("the mount's failure", lambda: other.condition("Ready").get("reason") == "MountFailed", 60)
    code, said = lockstep(model, "status", "absent")
    other.delete()
    assert code == 1
    assert "MountFailed: what to do: does the claim, the folder" in said
    assert lockstep(model, "status", "nobody") == (
        1,
        f"Error: there is no TensorParallelModel {model.namespace}/nobody\n",
    )


def test_plan_tells_what_a_change_would_do_and_changes_nothing(model: Model) -> None:
    before = model.read()["metadata"]["generation"]
    assert lockstep(model, "plan", "-f", "-", stdin=file_of(model)) == (0, "told: nothing changes\n")
    code, said = lockstep(model, "plan", "-f", "-", stdin=file_of(model, dtype="bfloat16"))
    assert code == 0
    assert "spec.dtype: float32 -> bfloat16 (restarts groups)" in said
    seconds = model.status()["groups"][0]["startSeconds"]
    assert f"about {seconds:.0f} s, as their last start took; meanwhile NO GROUP SERVES" in said
    canary = file_of(model, dtype="bfloat16", rollout={"partition": 1})
    code, said = lockstep(model, "plan", "-f", "-", stdin=canary)
    assert (code, "group 0 is below rollout.partition" in said, "is replaced" in said) == (0, True, False), said
    assert model.read()["metadata"]["generation"] == before


def test_plan_tells_what_would_be_refused(model: Model) -> None:
    code, said = lockstep(model, "plan", "-f", "-", stdin=file_of(model, ranksPerPod=3))
    assert (code, "ranksPerPod must divide tensorParallelSize" in said) == (1, True), said
    typo = breakable()["template"]
    typo["spec"]["nodeSelectr"] = {"a": "b"}
    code, said = lockstep(model, "plan", "-f", "-", stdin=file_of(model, template=typo))
    assert code == 1, said
    assert "told: the API server refuses its pods: " in said
    assert 'unknown field "spec.nodeSelectr"' in said


def test_top_asks_the_groups_themselves(model: Model) -> None:
    def asked() -> Object:
        code, said = lockstep(model, "top", "-o", "json")
        assert code == 0, said
        found: Object = json.loads(said)["told/0"]
        return found

    with Load(model, clients=2, pause=0.0) as load:
        model.until("a request to be running", lambda: asked()["running"] > 0, 60)
        model.until("an answer", lambda: load.answered > 0)
        found = asked()
    assert (found["state"], found["readyRanks"], found["ranks"]) == ("Ready", 2, 2)
    assert found["tokensPerSecond"] > 0
    assert found["stepP50Ms"] > 0
    assert load.failures == []


def test_inject_breaks_a_rank_and_the_receipts_count_it(model: Model) -> None:
    before = model.status().get("savings", {}).get("faults", 0)
    code, said = lockstep(model, "inject", "told", "sigkill", "--rank=1", "--phase=decode", "--skip=4")
    assert (code, said) == (0, "inject: sigkill on rank 1, decode\n")
    assert all(answer.finish for answer in answers(read(model, 64)))
    model.until("the receipts", lambda: model.status().get("savings", {}).get("faults", 0) > before, 30)
    saved = model.status()["savings"]
    assert saved["requests"] > 0
    assert saved["pausedSeconds"] > 0
    assert saved["restartsMeasured"] == saved["faults"]
    assert saved["restartSeconds"] == pytest.approx(saved["faults"] * model.status()["groups"][0]["startSeconds"])
    [node] = model.status()["nodeFaults"]
    assert node["fault"] == "RankLost"
    told = kubectl.kubectl("describe", "node", node["name"])
    assert f"{model.namespace}/told: RankLost in pod told-0-1" in told
    model.until_ready(30)


def test_inject_where_faults_are_not_allowed_names_the_game_day(model: Model) -> None:
    quiet = Model(model.api, model.namespace, "quiet")
    quiet.apply(breakable(template={}))
    quiet.until("its first pod", lambda: any(p["status"].get("phase") == "Running" for p in quiet.pods()), 60)
    code, said = lockstep(model, "inject", "quiet", "hang", "--rank=0")
    quiet.delete()
    assert code == 1
    assert "break a copy of it with `kubectl lockstep gameday quiet`" in said


def test_report_has_the_cluster_and_the_group_and_no_token(model: Model) -> None:
    code, said = lockstep(model, "report", "told")
    assert code == 0
    for section in ("## model", "## status", "## pods", "## events", "## group 0"):
        assert section in said
    found = {kind: model.secret(kind) for kind in ("token", "operator")}
    assert all(found.values())
    assert not [kind for kind, secret in found.items() if secret and secret["data"]["token"] in said]
    assert not [kind for kind in found if model.token(kind) in said]
    assert "told-0-0" in said


def test_a_game_day_proves_the_answers_on_a_copy_and_leaves_nothing(model: Model) -> None:
    uids = {pod["metadata"]["uid"] for pod in model.pods()}
    code, said = lockstep(model, "gameday", "told", "--tokens=64", "--timeout=120", seconds=240)
    print(said)
    assert code == 0, said
    assert said.splitlines()[-1] == "passed"
    assert said.count("the same answers letter for letter") == 2
    assert {pod["metadata"]["uid"] for pod in model.pods()} == uids
    names = [one["metadata"]["name"] for one in model.api.items("tensorparallelmodels", model.namespace)]
    assert [name for name in names if "gameday" in name] == []
    assert [pod for pod in model.api.items("pods", model.namespace) if "gameday" in pod["metadata"]["name"]] == []
