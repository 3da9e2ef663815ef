"""What clients may ask for: OpenAI's fields, and the few that vLLM's users know (top_k, min_p, stop_token_ids, ...).

A field that means something this server can't do is taken only with the value that asks for nothing; a field that
nobody knows is ignored, since clients send what newer versions of the API have.

Source: https://platform.openai.com/docs/api-reference/chat/create and .../completions/create
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from lockstep_runtime.api.chat import text_of
from lockstep_runtime.api.errors import ApiError, invalid, unsupported

MAX_CHOICES: Final = 128  # of one request: prompts times n
MAX_PROMPTS: Final = 128
MAX_MESSAGES: Final = 4096
_TOOLS: Final = "tool calling is not built yet"

# Field -> the values that ask for nothing, and what to say of the others. null always asks for nothing.
_NEUTRAL: Final[dict[str, tuple[tuple[object, ...], str]]] = {
    "audio": ((), "this server makes text only"),
    "bad_words": (([],), "words can't be banned"),
    "best_of": ((1,), "choices are not ranked; ask for `n`"),
    "chat_template": ((), "the model's own chat template is used"),
    "continue_final_message": ((False,), "the last message can't be continued"),
    "documents": (([],), "put them into the messages"),
    "frequency_penalty": ((0,), "penalties are not built yet"),
    "function_call": (("none", "auto"), _TOOLS),
    "functions": (([],), _TOOLS),
    "guided_choice": ((), "output can't be constrained yet"),
    "guided_grammar": ((), "output can't be constrained yet"),
    "guided_json": ((), "output can't be constrained yet"),
    "guided_regex": ((), "output can't be constrained yet"),
    "include_stop_str_in_output": ((False,), "the answer ends before the stop string"),
    "length_penalty": ((1,), "there is no beam search"),
    "logit_bias": (({},), "it is not built yet"),
    "min_tokens": ((0,), "it is not built yet"),
    "modalities": ((["text"],), "this server makes text only"),
    "prediction": ((), "it is not built yet"),
    "presence_penalty": ((0,), "penalties are not built yet"),
    "prompt_logprobs": ((0,), "only the answer's tokens have log probabilities"),
    "reasoning_effort": ((), "what the model's template knows goes into chat_template_kwargs, e.g. enable_thinking"),
    "repetition_penalty": ((1,), "penalties are not built yet"),
    "response_format": (({"type": "text"},), "output can't be constrained yet"),
    "skip_special_tokens": ((True,), "special tokens are not part of the answer"),
    "structured_outputs": ((), "output can't be constrained yet"),
    "suffix": (("",), "text can't be inserted before a suffix"),
    "tool_choice": (("none", "auto"), _TOOLS),
    "tools": (([],), _TOOLS),
    "truncate_prompt_tokens": ((), "prompts are not cut"),
    "use_beam_search": ((False,), "there is no beam search"),
    "web_search_options": ((), "there is no web search"),
}


def _text(content: object) -> str:
    return text_of(content)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(prompt: object) -> list[str | list[int]]:
    """One string, several, one list of token ids, or several."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _are_ids(prompt):
            return [prompt]
        if len(prompt) <= MAX_PROMPTS and all(isinstance(item, str) or _are_ids(item) for item in prompt):
            return prompt
    raise ValueError(f"Input should be a string, token ids, or a list of at most {MAX_PROMPTS} of either")


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_text)] = ""
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_tools(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if value.get("role") in ("tool", "function"):
                raise unsupported("role", _TOOLS)
            for name in ("tool_calls", "function_call"):
                if value.get(name):
                    raise unsupported(name, _TOOLS)
        return value

    def for_template(self) -> dict[str, str]:
        """Templates know `system`; OpenAI's newer name for the same role is `developer`."""
        shown = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return shown if self.reasoning_content is None else shown | {"reasoning_content": self.reasoning_content}


class StreamOptions(_Strict):
    include_usage: bool = False


class _Request(_Strict):
    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # -1 and 0: off
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int | None = Field(None, ge=1, le=16)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]] | None,
        BeforeValidator(_as_list),
        Field(max_length=16),
    ] = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(None, max_length=64)
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("`stream_options` is only for requests with `stream`: true", "stream_options")
        return self

    @property
    def choices(self) -> int:
        """Of one prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    REFUSED: ClassVar[dict[str, tuple[tuple[object, ...], str]]] = {"echo": ((False,), "it is for completions")}

    @model_validator(mode="after")
    def _top_of_log_probabilities(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("`top_logprobs` needs `logprobs`: true", "top_logprobs")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def asked_logprobs(self) -> int:
        """As `SamplingParams.logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else -1


class CompletionRequest(_Request):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    REFUSED: ClassVar[dict[str, tuple[tuple[object, ...], str]]] = {}

    @model_validator(mode="after")
    def _bounds_together(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise unsupported("logprobs", "the prompt's tokens have none; ask without `echo`")
        if len(self.prompt) * self.choices > MAX_CHOICES:
            raise invalid(f"`prompt` times `n` is more than {MAX_CHOICES} choices", "n")
        return self

    @property
    def asked_logprobs(self) -> int:
        """As `SamplingParams.logprobs`."""
        return -1 if self.logprobs is None else self.logprobs


RequestT = TypeVar("RequestT", ChatRequest, CompletionRequest)


def validate(kind: type[RequestT], body: dict[str, Any]) -> RequestT:
    """
    Raises:
        ApiError: 400 that names the field.
    """
    for name, (neutral, why) in (_NEUTRAL | kind.REFUSED).items():
        if body.get(name) is not None and body[name] not in neutral:
            raise unsupported(name, why)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _named(error) from None


def _named(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{param}: {message}" if param else message, param or None, first["type"])
