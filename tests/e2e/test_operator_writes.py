"""Whatever happens to an operator's requests, a model ends as under an operator that nothing happens to.

Three models of the same name live the same life side by side, each in a namespace of its own with operators of its own:
one undisturbed; one whose operator is killed before and after each of its writes; one with two operators that don't
know of each other and get bad answers from the API server. The deployed operator is away meanwhile.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from tests.support import kubectl
from tests.support.api_proxy import ApiProxy, truthful
from tests.support.api_troubles import READ_TROUBLES, WRITE_TROUBLES, BadAnswers, KilledAroundWrites
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_chaos import operator_away
from tests.support.cluster_lifecycle import DAMAGES, change_spec, scale
from tests.support.cluster_model import Model, tiny_chat
from tests.support.cluster_processes import kill, one_process
from tests.support.disturbed_life import Life, differences, end_state, events
from tests.support.local_operator import LocalOperator, deployed_settings, deployed_user
from tests.support.seed import printed_seed

NewNamespace = Callable[[str], str]
Object = dict[str, Any]

SETTLED_SECONDS: Final = 150.0
# All at once, and mended without a new pod.
MEDDLED: Final = (
    "ServiceAccount deleted", "headless Service deleted", "serving Service leads elsewhere", "NetworkPolicy opened",
    "StatefulSet's template edited",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is done to a model, and whether that has come to its end; `before` is the end state that came before it."""

    name: str
    act: Callable[[Model], None]
    settled: Callable[[Model, Object], bool]


def create(model: Model) -> None:
    model.apply(tiny_chat(tensorParallelSize=1, recovery={"strategy": "RecyclePods"}))


def meddle(model: Model) -> None:
    for damage in MEDDLED:
        DAMAGES[damage](model)


def kill_a_worker(model: Model) -> None:
    kill(one_process(model.pod(0, 0), "lockstep: worker"))


def serving(groups: int) -> Callable[[Model, Object], bool]:
    def settled(model: Model, before: Object) -> bool:
        return model.is_true("Ready") and len(model.endpoints()) == len(model.children("pods")) == groups

    return settled


def mended(model: Model, before: Object) -> bool:
    return not differences(before, end_state(model))


def grow(model: Model) -> None:
    change_spec(model, '{"spec": {"replicas": 2, "engine": {"maxSequences": 8}}}')


def grown(model: Model, before: Object) -> bool:
    arguments = [pod["spec"]["containers"][0]["args"] for pod in model.children("pods")]
    return serving(2)(model, before) and all("--max-sequences=8" in words for words in arguments)


def recycled(model: Model, before: Object) -> bool:
    return serving(1)(model, before) and model.status().get("lastRecovery", {}).get("rung") == "RecycleGroup"


SCENARIOS: Final = (
    Scenario("create", create, serving(1)),
    Scenario("meddle", meddle, mended),
    Scenario("recycle", kill_a_worker, recycled),
    Scenario("roll out and scale out", grow, grown),
    Scenario("scale in", lambda model: scale(model, 1), serving(1)),
)


class Lives:
    """The four, and what is done to their operators."""

    def __init__(self, api: ClusterApi, new_namespace: NewNamespace, deployment: Object, folder: Path) -> None:
        seed = printed_seed()
        self._api, self._new_namespace, self._deployment, self._folder = api, new_namespace, deployment, folder
        self.undisturbed = self._life("undisturbed")
        self.killed = self._life("killed")
        self.doubled = self._life("doubled", operators=2)
        self.all = (self.undisturbed, self.killed, self.doubled)
        self.answers = BadAnswers(random.Random(seed))
        self.doubled.proxy.plan, self.doubled.proxy.watch_lag = self.answers, self.answers.watch_lag

    def kill_around_writes(self) -> KilledAroundWrites:
        """Around all of them anew, also around those that were made before."""
        kills = KilledAroundWrites(self.killed.operators[0].replace)
        self.killed.proxy.plan = kills
        return kills

    def _life(self, name: str, operators: int = 1) -> Life:
        namespace = self._new_namespace(name)
        proxy = ApiProxy(kubectl.KUBECONFIG, deployed_user(self._deployment))
        life = Life(name, Model(self._api, namespace, "written"), proxy)
        proxy.start()
        for number in range(operators):
            folder = self._folder / f"{name}-{number}"
            life.operators.append(LocalOperator(proxy.url, namespace, deployed_settings(self._deployment), folder))
        return life

    def stop(self) -> None:
        for life in self.all:
            life.proxy.stop()  # it may be about to replace an operator
            for operator in life.operators:
                operator.kill()


@pytest.fixture
def lives(api: ClusterApi, new_namespace: NewNamespace, tmp_path: Path) -> Iterator[Lives]:
    with ExitStack() as stack:
        lives = Lives(api, new_namespace, stack.enter_context(operator_away(api)), tmp_path)
        stack.callback(lives.stop)
        for life in lives.all:
            for operator in life.operators:
                operator.start()
        yield lives


def test_a_model_ends_as_if_nothing_had_happened_to_its_operators(lives: Lives) -> None:
    for scenario in SCENARIOS:
        play(lives, scenario)
    assert events(lives.killed.model) == events(lives.undisturbed.model)
    for life in lives.all:
        life.proxy.plan = truthful
        life.replace_operators()
    for life in lives.all:
        life.until_quiet()
    for life in lives.all:
        life.model.delete()
    for life in lives.all:
        life.model.until_gone()
        life.check_operators()
    assert lives.answers.given.keys() == {
        *(f"write {trouble}" for trouble in WRITE_TROUBLES),
        *(f"read {trouble}" for trouble in READ_TROUBLES),
    }


def play(lives: Lives, scenario: Scenario) -> None:
    """Let it happen to all, and see that all end as the undisturbed one does."""
    before = end_state(lives.undisturbed.model)
    kills = lives.kill_around_writes()
    began = time.monotonic()
    for life in lives.all:
        scenario.act(life.model)
    for life in lives.all:
        life.until(f"'{scenario.name}'", partial(scenario.settled, life.model, before), SETTLED_SECONDS)
        print(f"{scenario.name}: {life.name} settled after {time.monotonic() - began:.1f} s")
    for life in (lives.killed, lives.doubled):
        life.until_same(lives.undisturbed)
    print(f"{scenario.name}: the same after {time.monotonic() - began:.1f} s and {kills.count} kills")
    assert lives.undisturbed.new_writes() <= kills.before & kills.after
