"""What clients may ask for: OpenAI's fields, and the few that vLLM's users know (top_k, min_p, stop_token_ids, ...).

null is as good as nothing in every field, and values that mean "none" are taken as OpenAI's and vLLM's servers take
them. A field that means something this server can't do is taken only with the value that asks for nothing; a field
that nobody knows is ignored, since clients send what newer versions of the API have.

Source: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lockstep_runtime.api.errors import ApiError, invalid, unsupported
from lockstep_runtime.api.grammar_fields import GrammarFields
from lockstep_runtime.api.images.content import Content, content_of, for_template, images_of, text_of
from lockstep_runtime.api.lenient import Flag, at_most, false_is_none, stops, whole, wholes
from lockstep_runtime.api.neutral import REFUSED, Neutral, check_neutral, schema_of
from lockstep_runtime.api.rule_fields import RuleFields
from lockstep_runtime.api.tools.schemas import ToolCall, ToolChoice, Tools

MAX_CHOICES: Final = 128  # of one request: prompts times n
MAX_PROMPTS: Final = 128
MAX_MESSAGES: Final = 4096

_ID: Final = {"type": "integer", "minimum": 0}
_TEXT: Final = {"type": "string", "minLength": 1}
_PROMPT_SCHEMA: Final = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
        {"type": "array", "items": _ID, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": _ID, "minItems": 1}, "minItems": 1,
         "maxItems": MAX_PROMPTS},
    ]
}  # fmt: skip
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_IMAGE_PART: Final = {
    "type": "object",
    "properties": {
        "type": {"const": "image_url"},
        "image_url": {"type": "object", "properties": {"url": _TEXT}, "required": ["url"]},
    },
    "required": ["type", "image_url"],
}
_CONTENT_SCHEMA: Final = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"anyOf": [_TEXT_PART, _IMAGE_PART]}},
        {"type": "null"},
    ]
}
_STOP_SCHEMA: Final = {
    "anyOf": [
        {"type": "string", "maxLength": 256},
        {"type": "array", "items": {"type": "string", "maxLength": 256}, "maxItems": 16},
        {"type": "null"},
    ]
}


def _content(content: object) -> Content:
    return content_of(content)


def _prompts(prompt: object) -> list[str | list[int]]:
    """One string, several, one list of token ids, or several."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if (ids := _ids(prompt)) is not None:
            return [ids]
        if len(prompt) <= MAX_PROMPTS:
            several = [item if isinstance(item, str) else _ids(item) for item in prompt]
            if (found := [one for one in several if one is not None]) and len(found) == len(several):
                return found
    raise ValueError(f"Input should be a string, token ids, or a list of at most {MAX_PROMPTS} of either")


def _ids(value: object) -> list[int] | None:
    """None if it is no list of token ids."""
    if not isinstance(value, list) or not value:
        return None
    ids = value if all(type(item) is int for item in value) else list(map(whole, value))
    return ids if all(type(item) is int and item >= 0 for item in ids) else None


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Body(BaseModel):
    """`REFUSED`: fields that are taken only where they ask for nothing."""

    REFUSED: ClassVar[Mapping[str, Neutral]] = {}

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Content, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)] = ""
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="vLLM's name of reasoning_content")
    tool_calls: list[ToolCall] | None = Field(None, description="of an assistant")
    tool_call_id: str | None = Field(None, description="of a tool's result")

    @model_validator(mode="before")
    @classmethod
    def _without_functions(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if value.get("role") == "function":
                raise unsupported("role", "functions are called tools now; use the role tool")
            if value.get("function_call"):
                raise unsupported("function_call", "functions are called tools now; use tool_calls")
        return value

    def for_template(self, *, objects: bool) -> dict[str, Any]:
        """Templates know `system`; OpenAI's newer name for the same role is `developer`.

        Args:
            objects: the template wants a call's arguments as an object.
        """
        role = "system" if self.role == "developer" else self.role
        shown: dict[str, Any] = {"role": role, "content": for_template(self.content)}
        thoughts = self.reasoning if self.reasoning_content is None else self.reasoning_content
        calls = [call.for_template(objects=objects) for call in self.tool_calls or ()]
        further = {
            "name": self.name,
            "reasoning_content": thoughts,
            "thinking": thoughts,  # as gpt-oss' template calls it
            "tool_call_id": self.tool_call_id,
            "tool_calls": calls or None,
        }
        return shown | {name: value for name, value in further.items() if value is not None}


class StreamOptions(Body):
    include_usage: Flag = None


class _Request(RuleFields, GrammarFields, Body):
    REFUSED: ClassVar[Mapping[str, Neutral]] = REFUSED

    model: str
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="0 takes the likeliest token")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 and 0: off")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int | None = Field(None, ge=1, le=16)
    best_of: int | None = Field(None, ge=1, le=16, description="so many are generated, and the likeliest `n` returned")
    stop: Annotated[
        list[Annotated[str, Field(max_length=256)]] | None,
        BeforeValidator(stops),
        at_most(16),
        WithJsonSchema(_STOP_SCHEMA),
    ] = None
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]] | None, Field(max_length=64), BeforeValidator(wholes), at_most(64)
    ] = None
    include_stop_str_in_output: Flag = Field(None, description="default: the answer ends before it")
    skip_special_tokens: Flag = Field(None, description="default: true")
    ignore_eos: Flag = None
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="only requests with the same share what was computed for their prompts",
    )
    stream: Flag = None
    stream_options: StreamOptions | None = None

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        schema["properties"] |= schema_of(cls.REFUSED)
        return schema

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.include_usage and not self.stream:
            raise invalid("`stream_options` is only for requests with `stream`: true", "stream_options")
        return self

    @model_validator(mode="after")
    def _best_of(self) -> Self:
        if self.drawn < self.choices:
            raise invalid("`best_of` must be at least `n`", "best_of")
        if self.drawn > self.choices and self.stream:
            raise invalid("`best_of` is known at the end only: it must be `n` in a stream", "best_of")
        return self

    @property
    def choices(self) -> int:
        """Of one prompt."""
        return self.n or 1

    @property
    def drawn(self) -> int:
        """Choices of one prompt that are generated."""
        return self.best_of or self.choices

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Conversation(Body):
    """What a chat's prompt is made of."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES), at_most(MAX_MESSAGES)]
    tools: Tools = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Flag = Field(None, description="default: true, unless the last message is continued")
    continue_final_message: Flag = Field(
        None, description="the last message stays open, and the answer goes on with it"
    )
    add_special_tokens: Flag = Field(None, description="the tokenizer's, beside the template's; default: false")

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            message = "`continue_final_message` and `add_generation_prompt` can't both be true"
            raise invalid(message, "continue_final_message")
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """None: the model isn't told of any."""
        return self.tools or None

    def image_urls(self) -> list[str]:
        """Of all messages, in order."""
        return [image.url for message in self.messages for image in images_of(message.content)]

    def template_variables(self) -> dict[str, Any]:
        return self.chat_template_kwargs or {}


class ChatRequest(Conversation, _Request):
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="default: what the model has room for")
    logprobs: Flag = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tool_choice: ToolChoice = Field(None, description="default: auto with tools")
    parallel_tool_calls: Flag = Field(None, description="false: the answer ends with its first call; default: true")
    reasoning_effort: ReasoningEffort | None = Field(None, description="none: without reasoning, if the model can")
    echo: Flag = Field(None, description="the last message before the answer that goes on with it")

    @model_validator(mode="after")
    def _top_of_log_probabilities(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("`top_logprobs` needs `logprobs`: true", "top_logprobs")
        return self

    @model_validator(mode="after")
    def _choice_of_tools(self) -> Self:
        if self.tool_choice is None or self.tool_choice in ("none", "auto"):
            return self
        if not self.tools:
            raise invalid("`tool_choice` needs `tools`", "tool_choice")
        names = [tool["function"]["name"] for tool in self.tools]
        if isinstance(self.tool_choice, tuple) and self.tool_choice[0] not in names:
            raise invalid(f"`tool_choice`: there is no tool {self.tool_choice[0]!r} in `tools`", "tool_choice")
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """None: the model isn't told of any."""
        return super().offered_tools if self.tool_choice != "none" else None

    @property
    def demanded_tools(self) -> list[dict[str, Any]] | None:
        """Of which one must be called; None: the model decides."""
        if self.tool_choice == "required":
            return self.tools
        if isinstance(self.tool_choice, tuple) and self.tools:
            return [tool for tool in self.tools if tool["function"]["name"] == self.tool_choice[0]][:1]
        return None

    @property
    def echoed(self) -> str:
        """What the answer begins with."""
        last = self.messages[-1]
        return text_of(last.content) if self.echo and last.role == "assistant" else ""

    def template_variables(self) -> dict[str, Any]:
        """An effort is a variable of some templates, and for the others a switch."""
        effort = self.reasoning_effort
        implied = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return implied | super().template_variables()

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def asked_logprobs(self) -> int:
        """As `SamplingParams.logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else -1


class CompletionRequest(_Request):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="default: 16; 0 with echo: the prompt alone")
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None,
        BeforeValidator(false_is_none),
        WithJsonSchema({"enum": [None, False, *range(21)]}),
    ] = None
    echo: Flag = Field(None, description="with logprobs: the prompt's tokens have theirs, too")
    add_special_tokens: Flag = Field(None, description="such as a beginning of text before a prompt; default: true")

    @model_validator(mode="after")
    def _bounds_together(self) -> Self:
        if len(self.prompt) * self.drawn > MAX_CHOICES:
            name = "n" if self.drawn == self.choices else "best_of"
            raise invalid(f"`prompt` times `{name}` is more than {MAX_CHOICES} choices", name)
        return self

    @property
    def asked_logprobs(self) -> int:
        """As `SamplingParams.logprobs`."""
        return -1 if self.logprobs is None else self.logprobs


BodyT = TypeVar("BodyT", bound=Body)


def validate(kind: type[BodyT], body: dict[str, Any]) -> BodyT:
    """
    Raises:
        ApiError: 400 that names the field.
    """
    check_neutral(body, kind.REFUSED)
    try:
        return kind.model_validate({name: whole(value) for name, value in body.items()})
    except ValidationError as error:
        raise _named(error) from None


def _named(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{param}: {message}" if param else message, param or None, first["type"])
