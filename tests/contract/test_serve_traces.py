"""Requests and recoveries of a served model as a real OTLP receiver gets them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tests.support.collector import Collector, attributes, collecting, seconds
from tests.support.faults import inject
from tests.support.http import HTTP
from tests.support.ports import free_port
from tests.support.serve import Served, served
from tests.support.stream import start
from tests.support.wait import until

from lockstep_runtime.protocol.chaos import FaultPhase, Injection
from lockstep_runtime.protocol.trace_ids import recovery_ids

DOWN = "the collector of traces doesn't take them"
UP = "the collector takes traces again"
PROMPT = "What is a module? "
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECONDS = 30.0


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Served]:
    """It begins while the collector is away."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        "NO_PROXY": "127.0.0.1",
    }
    arguments = ("--tensor-parallel-size", "2", "--backend", "cpu", "--allow-faults", "--served-name", "tiny-chat")
    with served(tmp_path_factory.mktemp("serve"), *arguments, environment=environment) as serve:
        serve.ready()
        yield serve
        began = time.monotonic()  # the collector is away again: nothing is waited for longer than the last flush
        assert serve.end() == 0
        assert time.monotonic() - began < 15


@pytest.fixture(scope="module")
def collector(group: Served, port: int) -> Iterator[Collector]:
    for _ in range(5):
        group.complete(PROMPT, 4)
    until("the collector's absence to be told", lambda: DOWN in group.log.read_text(), SECONDS)
    with collecting(port) as collector:
        until("traces to arrive", lambda: (group.complete(PROMPT, 1), collector.spans)[1], SECONDS)
        yield collector


def request(collector: Collector, trace: str) -> Span | None:
    found = [span for span in collector.named("text_completion tiny-chat") if span.trace_id.hex() == trace]
    return found[0] if found else None


def trace_of(header: str) -> str:
    version, trace, _, flags = header.split("-")
    assert (version, flags) == ("00", "01")
    return trace


def test_a_collector_that_is_away_is_told_of_once_and_harms_no_request(group: Served, collector: Collector) -> None:
    until("the collector's return to be told", lambda: UP in group.log.read_text(), SECONDS)
    log = group.log.read_text()
    assert (log.count(DOWN), log.count(UP)) == (1, 1)
    assert "Traceback" not in log
    assert "opentelemetry" not in log


def test_a_request_is_a_trace_within_its_callers(group: Served, collector: Collector) -> None:
    body = {"model": "tiny-chat", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    began = time.time()
    answer = HTTP.post(f"{group.api}/v1/completions", json=body, headers=headers, timeout=60)
    took = time.time() - began
    assert trace_of(answer.headers["traceresponse"]) == TRACE
    span = until("the request's span", lambda: request(collector, TRACE), SECONDS)

    assert (span.parent_span_id.hex(), span.kind, span.status.code) == (
        PARENT,
        Span.SPAN_KIND_SERVER,
        Status.STATUS_CODE_UNSET,
    )
    assert answer.headers["traceresponse"].split("-")[2] == span.span_id.hex()
    said = attributes(iter(span.attributes))
    usage = answer.json()["usage"]
    assert said["gen_ai.operation.name"] == "text_completion"
    assert said["gen_ai.request.model"] == "tiny-chat"
    assert said["gen_ai.response.id"] == answer.json()["id"]
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (usage["prompt_tokens"], 12)
    assert said["gen_ai.response.finish_reasons"] == ["length"]

    parts = collector.children(span)
    assert list(parts) == ["queue", "prefill", "decode"]
    queue, prefill, decode = parts.values()
    assert span.start_time_unix_nano == queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= span.end_time_unix_nano
    assert all(seconds(part) >= 0 for part in parts.values())
    assert 0 < seconds(prefill) + seconds(decode) <= seconds(span) <= took
    assert not span.links
    where = collector.resources[-1]
    assert (where["service.name"], where["lockstep.group"]) == ("lockstep", "0")
    assert where["k8s.pod.name"] == group.status().ranks[0].pod
    assert where["deployment.environment.name"] == "test"


def test_a_refusal_is_a_trace_that_failed(group: Served, collector: Collector) -> None:
    trace = TRACE[::-1]
    body = {"model": "tiny-chat", "prompt": PROMPT, "max_tokens": 1_000_000}
    headers = {"traceparent": f"00-{trace}-{PARENT}-01"}
    answer = HTTP.post(f"{group.api}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    span = until("the refused request's span", lambda: request(collector, trace), SECONDS)
    assert (span.status.code, attributes(iter(span.attributes))["error.type"]) == (Status.STATUS_CODE_ERROR, "400")
    assert not collector.children(span)


def test_a_recovery_is_a_trace_to_which_the_requests_that_it_paused_are_linked(
    group: Served, collector: Collector
) -> None:
    def requests(tokens: int, count: int) -> list[Span]:
        """Those that asked for so many."""

        def arrived() -> list[Span]:
            spans = collector.named("text_completion tiny-chat")
            found = [
                one for one in spans if attributes(iter(one.attributes)).get("gen_ai.request.max_tokens") == tokens
            ]
            return found if len(found) == count else []

        return until(f"{count} requests for {tokens} tokens", arrived, SECONDS)

    group.complete(PROMPT, 57)
    streams = start(group.api, "tiny-chat", 60, SECONDS)
    inject(group, Injection.HANG, 1, phase=FaultPhase.DECODE, skip=20)
    assert [(stream.wait().finish, stream.error) for stream in streams] == [("length", "")] * 2
    group.complete(PROMPT, 59)
    [recovery] = until("the recovery's span", lambda: collector.named("recovery Hang"), SECONDS)
    before, after, paused = requests(57, 1), requests(59, 1), requests(60, 2)

    [record] = group.status().faults
    assert (record.rung, record.requests_resumed) == ("Respawn", 2)
    parts = collector.children(recovery)
    assert {name: round(seconds(part), 4) for name, part in parts.items()} == record.phases
    assert set(parts) == {"detect", "abort", "respawn", "rebuild", "verify", "firstToken"}
    assert abs(parts["detect"].end_time_unix_nano / 1e9 - record.at) < 1e-3
    said = attributes(iter(recovery.attributes))
    assert (said["lockstep.fault.type"], said["lockstep.fault.rank"]) == ("Hang", 1)
    assert (said["lockstep.recovery.rung"], said["lockstep.recovery.requests_resumed"]) == ("Respawn", 2)
    assert recovery.parent_span_id == b""
    ids = int.from_bytes(recovery.trace_id), int.from_bytes(recovery.span_id)
    assert ids == recovery_ids("local", 0, record), "who reads the record can link to the trace"

    assert [[link.trace_id for link in span.links] for span in paused] == [[recovery.trace_id]] * 2
    assert len({span.trace_id for span in [*before, *after, *paused, recovery]}) == 5
    assert not any(span.links for span in [*before, *after])


def test_no_span_has_a_prompt_or_an_answer(group: Served, collector: Collector) -> None:
    text = group.complete(PROMPT, 16)
    count = len(collector.bodies)
    until("its span", lambda: len(collector.bodies) > count, SECONDS)
    assert len(text) > 8
    for body in collector.bodies:
        assert PROMPT.encode() not in body
        assert text.encode() not in body
