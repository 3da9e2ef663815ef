"""The queue of models, the retries around a reconciliation, and the settings."""

from __future__ import annotations

import asyncio
from dataclasses import fields

import pytest
from tests.support.operator_settings import read_settings

from lockstep_operator.backoff import backoff
from lockstep_operator.cluster.client import KubeError
from lockstep_operator.cluster.pace import Pace
from lockstep_operator.controller import BUSY_PASSES, Controller
from lockstep_operator.reconcile import ReconcileOutcome
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.settings import Settings
from lockstep_operator.types.names import ModelKey
from lockstep_operator.workqueue import WorkQueue

KEY = ModelKey("team", "chat")


async def soon(queue: WorkQueue[str]) -> str:
    async with asyncio.timeout(5):
        return await queue.take()


async def test_a_key_waits_only_once_however_often_it_is_asked_for() -> None:
    queue = WorkQueue[str](lambda: 0.0)
    for _ in range(3):
        queue.add("a")
    queue.add("b")
    assert [await soon(queue), await soon(queue)] == ["a", "b"]
    assert len(queue) == 0


async def test_a_key_asked_for_while_it_is_worked_on_comes_again_afterwards_and_not_before() -> None:
    queue = WorkQueue[str](lambda: 0.0)
    queue.add("a")
    await soon(queue)
    queue.add("a")
    assert len(queue) == 0
    queue.done("a")
    assert await soon(queue) == "a"


async def test_a_key_that_is_due_later_comes_when_its_time_has_come_and_the_earlier_time_wins() -> None:
    now = 0.0
    queue = WorkQueue[str](lambda: now)
    queue.add_after("a", 20)
    queue.add_after("a", 10)
    queue.add_after("a", 30)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await queue.take()
    now = 10.0
    queue.add_after("b", 99)  # wakes it, as any news does
    assert await soon(queue) == "a"


async def test_what_is_urgent_comes_first_and_some_workers_take_nothing_else() -> None:
    queue = WorkQueue[str](lambda: 0.0)
    for key in "abc":
        queue.add(key)
    waiting = asyncio.create_task(queue.take(urgent=True))
    await asyncio.sleep(0)
    assert not waiting.done(), "nothing is urgent"
    queue.add("c", urgent=True)
    queue.add("c")
    async with asyncio.timeout(5):
        assert await waiting == "c"
    queue.add("b", urgent=True)
    assert [await soon(queue), await soon(queue)] == ["b", "a"]
    assert len(queue) == 0
    assert [queue.done(key) for key in "abc"] == [False, True, True]


async def test_what_becomes_urgent_while_it_is_worked_on_is_so_the_next_time() -> None:
    queue = WorkQueue[str](lambda: 0.0)
    queue.add("a")
    await soon(queue)
    queue.add("b")
    queue.add("a", urgent=True)
    queue.add("a")
    assert not queue.done("a")
    assert [await soon(queue), await soon(queue)] == ["a", "b"]


async def test_a_key_that_is_put_off_and_asked_for_comes_once() -> None:
    now = 0.0
    queue = WorkQueue[str](lambda: now)
    queue.add_after("a", 5)
    queue.add("a")
    assert await soon(queue) == "a"
    queue.done("a")
    queue.add_after("a", 7)
    now = 6.0
    queue.add_after("b", 0)
    assert await soon(queue) == "b", "the first time it was put off to is no longer asked for"
    now = 7.0
    queue.done("b")
    assert await soon(queue) == "a"


async def test_a_waiting_worker_is_woken() -> None:
    queue = WorkQueue[str](lambda: 0.0)
    taker = asyncio.create_task(soon(queue))
    await asyncio.sleep(0)
    queue.add("a")
    assert await taker == "a"


class Scripted:
    """Reconciliations that end as told."""

    def __init__(self, *ends: ReconcileOutcome | Exception) -> None:
        self.ends = list(ends)

    async def __call__(self, key: ModelKey) -> ReconcileOutcome:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def controller(*ends: ReconcileOutcome | Exception) -> Controller:
    return Controller(WorkQueue(lambda: 0.0), Scripted(*ends), Metrics())


async def test_failures_are_retried_with_growing_delays_until_a_success() -> None:
    error = KubeError(503, "ServiceUnavailable", "later")
    steps = controller(*[error] * 8, ReconcileOutcome(requeue_after=60.0), error)
    delays = [await steps.step(KEY) or 0.0 for _ in range(10)]
    assert 0.25 <= delays[0] <= 0.5
    assert 30 <= delays[7] <= 60
    assert 48 <= delays[8] <= 60, "spread, so that not all models come at once"
    assert delays[9] <= 0.5, "a success begins the count anew"


async def test_a_bug_in_one_model_stops_no_other() -> None:
    steps = controller(ValueError("a bug"), ReconcileOutcome(requeue_after=10.0))
    assert (await steps.step(KEY) or 0) >= 1.0
    assert await steps.step(ModelKey("team", "other")) is not None


def failing(metrics: Metrics) -> dict[str, float]:
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {s.labels["model"]: s.value for s in samples if s.name == "lockstep_operator_reconcile_failing"}


@pytest.mark.parametrize(
    "end",
    [
        KubeError(500, "", "field not declared in schema"),
        ValueError("a bug"),
        ReconcileOutcome(requeue_after=60.0, failing=True),
    ],
)
async def test_one_model_that_can_not_be_reconciled_shows_until_it_can_or_is_gone(
    end: ReconcileOutcome | Exception,
) -> None:
    metrics = Metrics()
    script = Scripted(
        end,
        ReconcileOutcome(requeue_after=60.0),
        ReconcileOutcome(requeue_after=60.0),
        end,
        ReconcileOutcome(requeue_after=None),
    )
    steps = Controller(WorkQueue(lambda: 0.0), script, metrics)
    await steps.step(KEY)
    assert failing(metrics) == {"chat": 1}
    await steps.step(KEY)
    await steps.step(ModelKey("team", "well"))
    assert failing(metrics) == {"chat": 0, "well": 0}
    await steps.step(KEY)
    assert failing(metrics) == {"chat": 1, "well": 0}
    metrics.forget(KEY)  # as the reconciler does when a model is gone
    await steps.step(KEY)
    assert failing(metrics) == {"well": 0}


async def test_models_that_were_looked_at_together_are_not_for_ever() -> None:
    steps = controller(*[ReconcileOutcome(requeue_after=60.0)] * 20)
    delays = [await steps.step(ModelKey("team", f"m{number}")) or 0.0 for number in range(20)]
    assert len(set(delays)) > 10
    assert 48 <= min(delays) <= max(delays) <= 60


async def test_a_fight_with_another_writer_is_slowed_down() -> None:
    steps = controller(*[ReconcileOutcome(requeue_after=0.0, wrote=True)] * (BUSY_PASSES + 8))
    delays = [await steps.step(KEY) or 0.0 for _ in range(BUSY_PASSES + 8)]
    assert delays[:BUSY_PASSES] == [0.0] * BUSY_PASSES
    assert delays[-1] >= 30


async def test_a_fault_waits_for_no_other_models_pass() -> None:
    """All workers are busy with passes that take long; what the first pass has decided is done at once, too."""
    queue, held = WorkQueue[ModelKey](asyncio.get_running_loop().time), asyncio.Event()
    poisoned, passes = ModelKey("team", "poisoned"), list[ModelKey]()
    busy, acted = asyncio.Event(), asyncio.Event()

    async def reconcile(key: ModelKey) -> ReconcileOutcome:
        passes.append(key)
        if key != poisoned:
            if len(passes) == 2:
                busy.set()
            await held.wait()
        elif passes.count(poisoned) == 2:
            acted.set()
            return ReconcileOutcome(requeue_after=60.0)
        return ReconcileOutcome(requeue_after=0.0, wrote=True)

    task = asyncio.create_task(Controller(queue, reconcile, Metrics()).run(2))
    for number in range(20):
        queue.add(ModelKey("team", f"m{number}"))
    async with asyncio.timeout(10):
        await busy.wait()
        queue.add(poisoned, urgent=True)
        await acted.wait()
    assert passes[2:] == [poisoned, poisoned]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_requests_come_in_bursts_and_then_at_their_rate() -> None:
    loop = asyncio.get_running_loop()
    pace, began = Pace(rate=200.0, burst=20, now=loop.time), loop.time()
    for _ in range(20):
        await pace.turn()
    assert loop.time() - began < 0.05, "no wait"
    await asyncio.gather(*(pace.turn() for _ in range(40)))
    assert loop.time() - began >= 0.19


async def test_a_model_that_is_gone_is_not_looked_at_again() -> None:
    assert await controller(ReconcileOutcome(requeue_after=None)).step(KEY) is None


async def test_workers_run_models_at_the_same_time_but_no_model_twice() -> None:
    queue, running, most, done = (
        WorkQueue[ModelKey](asyncio.get_running_loop().time),
        set[ModelKey](),
        0,
        asyncio.Event(),
    )
    seen: list[ModelKey] = []

    async def reconcile(key: ModelKey) -> ReconcileOutcome:
        nonlocal most
        assert key not in running
        running.add(key)
        most = max(most, len(running))
        queue.add(key)
        await asyncio.sleep(0.001)
        running.discard(key)
        seen.append(key)
        if len(seen) >= 12:
            done.set()
        return ReconcileOutcome(requeue_after=None)

    task = asyncio.create_task(Controller(queue, reconcile, Metrics()).run(3))
    for name in "abcd":
        queue.add(ModelKey("team", name))
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert most == 3


def test_backoff_grows_and_ends() -> None:
    assert 0.5 <= backoff(1, 1.0, 60.0) <= 1.0
    assert 30 <= backoff(1000, 1.0, 60.0) <= 60


def test_settings_come_from_flags_then_variables_then_defaults() -> None:
    environment = {"LOCKSTEP_RUNTIME_IMAGE": "env:1", "LOCKSTEP_NAMESPACES": "a, b", "LOCKSTEP_PORT": "9000"}
    assert read_settings([], environment) == Settings(runtime_image="env:1", namespaces=("a", "b"), port=9000)
    flags = ["--runtime-image", "flag:1", "--namespace", "c", "--concurrency", "2", "--resync-seconds", "5"]
    assert read_settings(flags, environment) == Settings(
        runtime_image="flag:1", namespaces=("c",), port=9000, concurrency=2, resync_seconds=5.0
    )
    assert read_settings(["--all-namespaces"], environment).namespaces == ()
    empty = environment | {"LOCKSTEP_PORT": "", "LOCKSTEP_NAMESPACES": "", "LOCKSTEP_OPERATOR_NAMESPACE": ""}
    assert read_settings([], empty) == Settings(runtime_image="env:1"), "an empty variable is none"


def test_help_names_every_flag_and_its_variable_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(["--help"], {})
    assert ended.value.code == 0
    page = " ".join(capsys.readouterr().out.split())
    for name in ("RUNTIME_IMAGE", "FS_GROUP", "API_FROM", "PORT", "RESYNC_SECONDS", "NAMESPACES"):
        assert f"LOCKSTEP_{name}" in page
    for field in fields(Settings):
        flag = {"pull_policy": "runtime_image_pull_policy", "pull_secrets": "runtime_image_pull_secrets"}
        assert f"--{flag.get(field.name, field.name).replace('_', '-').removesuffix('s')}" in page


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {}, "--runtime-image"),
        (["--port", "0"], {"LOCKSTEP_RUNTIME_IMAGE": "a"}, "0 is not in the range x>=1"),
        ([], {"LOCKSTEP_RUNTIME_IMAGE": "a", "LOCKSTEP_PORT": "x"}, "'x' is not a valid integer"),
        ([], {"LOCKSTEP_RUNTIME_IMAGE": "a", "LOCKSTEP_LOG_LEVEL": "loud"}, "loud"),
        ([], {"LOCKSTEP_RUNTIME_IMAGE": "a", "LOCKSTEP_LOG_FORMAT": "xml"}, "'xml' is not one of 'text', 'json'"),
        ([], {"LOCKSTEP_RUNTIME_IMAGE": "a", "LOCKSTEP_API_FROM": "everybody"}, "'everybody' is not JSON"),
        ([], {"LOCKSTEP_RUNTIME_IMAGE": "a", "LOCKSTEP_SCRAPE_FROM": "[{}]"}, "not a list of NetworkPolicyPeers"),
        (["--namespace", "a", "--all-namespaces"], {"LOCKSTEP_RUNTIME_IMAGE": "a"}, "not allowed with"),
    ],
)
def test_settings_that_make_no_sense_end_with_a_sentence(
    arguments: list[str], environment: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(arguments, environment)
    assert words in f"{ended.value} {capsys.readouterr().err}"


async def test_a_model_that_can_not_be_made_as_asked_is_counted_and_no_longer_when_it_is() -> None:
    metrics = Metrics()
    ends = Scripted(
        ReconcileOutcome(requeue_after=9.0, failing=True),
        ReconcileOutcome(requeue_after=9.0),
        KubeError(503, "", "later"),
    )
    steps = Controller(WorkQueue(lambda: 0.0), ends, metrics)
    found: list[float | None] = []
    for _ in range(3):
        await steps.step(KEY)
        found.append(
            metrics.registry.get_sample_value(
                "lockstep_operator_reconcile_failing", {"namespace": "team", "model": "chat"}
            )
        )
    assert found == [1.0, 0.0, 1.0]
