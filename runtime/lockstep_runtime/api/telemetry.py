"""A request in the words of OpenTelemetry's conventions for generative AI; never its prompt or its answer.

Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Send

from lockstep_runtime.api.generation import Job
from lockstep_runtime.tracing.request import Attributes, RequestTrace
from lockstep_runtime.tracing.traces import Traces


def request_trace(traces: Traces, operation: str, model: str, headers: Headers, arrived: float) -> RequestTrace:
    """`arrived` is monotonic, in seconds."""
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "lockstep",
        "gen_ai.request.model": model,
    }
    return traces.request(f"{operation} {model}", headers, attributes, arrived)


def answer_attributes(job: Job, usage: Mapping[str, Any]) -> Attributes:
    """`usage` is the answer's."""
    first = job.requests[0]
    return {
        "gen_ai.response.model": job.model,
        "gen_ai.response.id": job.id,
        "gen_ai.request.max_tokens": first.max_tokens,
        "gen_ai.request.temperature": first.sampling.temperature,
        "gen_ai.request.top_p": first.sampling.top_p,
        "gen_ai.request.choice.count": len(job.requests),
        "gen_ai.request.stream": job.stream,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }


def with_header(send: Send, header: tuple[bytes, bytes]) -> Send:
    """The answer's head has it."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], header]}
        await send(message)

    return sending
