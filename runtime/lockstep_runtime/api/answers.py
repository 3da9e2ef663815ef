"""What answers look like, for the schema at /openapi.json. Answers themselves are encoded by hand (forms.py): a stream
goes through no model.

Source: https://platform.openai.com/docs/api-reference/chat/object, .../chat-streaming, .../completions/object
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's form, in a stream's last event, too."""

    error: ErrorDetail


class CompletionTokensDetails(BaseModel):
    """`reasoning_tokens`: drawn between the markers, which don't count."""

    reasoning_tokens: int


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: at the prompts' beginnings, computed for earlier requests."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobsBody(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class FunctionBody(BaseModel):
    name: str
    arguments: str


class ToolCallBody(BaseModel):
    """`arguments` are JSON, unless the answer was cut (`length`)."""

    id: str
    type: Literal["function"]
    function: FunctionBody


class AnswerMessage(BaseModel):
    """`content` is null beside calls, if the model wrote nothing else."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallBody] | None = None


FinishReasonName = Literal["stop", "length"]
ChatFinishReasonName = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobsBody | None
    finish_reason: ChatFinishReasonName


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """The first of a call has its id and name; the others go on with its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobsBody | None
    finish_reason: ChatFinishReasonName | None


class ChatCompletionChunk(BaseModel):
    """One event of a stream; the last is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobsBody(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobsBody | None
    finish_reason: FinishReasonName | None


class Completion(BaseModel):
    """Whole, or one event of a stream, whose last is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """OpenAI's model object, with vLLM's `max_model_len`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]


class Version(BaseModel):
    version: str


class ReadyBody(BaseModel):
    ready: bool
    reason: str


Responses = dict[int | str, dict[str, Any]]
COMPONENT: Final = "#/components/schemas/{model}"

_ERRORS: Final = {
    400: "The request can't be served as it is: `param` names the field",
    401: "The API key is missing or wrong",
    404: "This server serves another model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not sent as application/json",
    500: "The request failed permanently",
    503: "Nothing can be queued now: try again after `Retry-After` seconds",
}


def errors(*statuses: int) -> Responses:
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def streamed(whole: type[BaseModel], chunk: type[BaseModel]) -> Responses:
    """200, whole as JSON or event by event: `itemSchema` (OpenAPI 3.2) is of one event, as in FastAPI's own streams."""
    parts = {"anyOf": [{"$ref": COMPONENT.format(model=one.__name__)} for one in (chunk, ErrorBody)]}
    data = {
        "anyOf": [
            {"type": "string", "contentMediaType": "application/json", "contentSchema": parts},
            {"const": "[DONE]", "description": "The last event of a stream that is complete"},
        ]
    }
    event = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    return {200: {"model": whole, "description": "The answer", "content": {"text/event-stream": event}}}
