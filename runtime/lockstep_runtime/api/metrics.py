"""`/metrics`: names people know from vLLM, with the prefix `lockstep_` and the label `model_name`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lockstep_runtime.engine.client import EngineStats, FinishReason

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_FIRST: Final = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
_WHOLE: Final = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_FAILURES: Final = ("disconnected", "failed", "refused", "unavailable")

_GAUGES: Final[tuple[tuple[str, str, Callable[[EngineStats], float]], ...]] = (
    ("num_requests_running", "Sequences that take part in steps", lambda stats: stats.requests_running),
    ("num_requests_waiting", "Sequences that wait for their first or next step", lambda stats: stats.requests_waiting),
    (
        "kv_cache_usage_ratio",
        "KV-cache blocks in use, 0 to 1",
        lambda stats: stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0,
    ),
    ("epoch", "The group's epoch: rises with every rebuild of its communicator", lambda stats: stats.epoch),
)
_COUNTERS: Final[tuple[tuple[str, str, Callable[[EngineStats], float]], ...]] = (
    ("preemptions", "Sequences preempted because KV-cache blocks ran out", lambda stats: stats.preemptions_total),
    (
        "prefix_cache_queries",
        "Tokens of prompts that were looked for in the prefix cache",
        lambda stats: stats.prefix_cache_queries_total,
    ),
    (
        "prefix_cache_hits",
        "Tokens of prompts that were found there, and not computed",
        lambda stats: stats.prefix_cache_hits_total,
    ),
    ("steps", "Steps that all ranks finished", lambda stats: stats.steps_total),
    ("recoveries", "Repaired faults of the group", lambda stats: stats.recoveries_total),
)


class _EngineCollector(Collector):
    """Asks the engine when it is scraped, never in between."""

    def __init__(self, stats: Callable[[], EngineStats], model: str) -> None:
        self._stats = stats
        self._model = model

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"lockstep_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value(stats))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(f"lockstep_{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value(stats))
            yield counter
        if stats.last_step_at is not None:
            last = GaugeMetricFamily("lockstep_last_step_timestamp_seconds", "Unix time", labels=["model_name"])
            last.add_metric([self._model], stats.last_step_at)
            yield last


class Metrics:
    """Latencies and tokens are counted per choice, failures per HTTP request."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, model))
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to the first token", _FIRST).labels(model)
        self._between = self._histogram("inter_token_latency_seconds", "Token to token", _BETWEEN).labels(model)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to the last token", _WHOLE).labels(model)
        self._prompt = self._counter("prompt_tokens", "Tokens of accepted prompts").labels(model)
        self._generated = self._counter("generation_tokens", "Tokens generated").labels(model)
        success = self._counter("request_success", "Choices completed", "finished_reason")
        self._success = {reason: success.labels(model, reason.value) for reason in FinishReason}
        failures = self._counter("requests_failed", "HTTP requests that were not completed", "reason")
        self._failures = {reason: failures.labels(model, reason) for reason in _FAILURES}

    def accepted(self, prompt_tokens: int) -> None:
        self._prompt.inc(prompt_tokens)

    def failed(self, reason: str) -> None:
        """`reason` is one of disconnected, failed, refused (4xx), unavailable (429, 503)."""
        self._failures[reason].inc()

    def clock(self, arrived: float) -> ChoiceClock:
        return ChoiceClock(self, arrived)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"lockstep_{name}", text, ["model_name"], registry=self._registry, buckets=buckets)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lockstep_{name}", text, ["model_name", *labels], registry=self._registry)


class ChoiceClock:
    """Times one choice. All times in seconds of one monotonic clock."""

    __slots__ = ("_arrived", "_last", "_metrics")

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last: float | None = None

    def token(self, now: float) -> None:
        metrics = self._metrics
        if self._last is None:
            metrics._first.observe(now - self._arrived)
        else:
            metrics._between.observe(now - self._last)
        self._last = now
        metrics._generated.inc()

    def finished(self, reason: FinishReason, now: float) -> None:
        self._metrics._success[reason].inc()
        self._metrics._whole.observe(now - self._arrived)
