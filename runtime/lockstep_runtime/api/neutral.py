"""Fields of OpenAI's and vLLM's APIs that mean something this server can't do: taken only with a value that asks for
nothing, refused with a reason otherwise. null always asks for nothing.

Source: https://platform.openai.com/docs/api-reference/chat/create and vLLM's `ChatCompletionRequest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lockstep_runtime.api.errors import unsupported

_FUNCTIONS: Final = "functions are called tools now; use `tools` and `tool_choice`"
_TEXT_ONLY: Final = "this server makes text only; leave it out"
_NO_EMBEDDINGS: Final = "prompts are text or token ids"
OFF: Final[tuple[object, ...]] = (False, 0)  # as pydantic's and vLLM's booleans are read


@dataclass(frozen=True, slots=True)
class Neutral:
    """`values` ask for nothing; of any other, `why` says what to do."""

    values: tuple[object, ...]
    why: str


REFUSED: Final[Mapping[str, Neutral]] = {
    "allowed_token_ids": Neutral(([],), "use `guided_choice`, or `logit_bias` of -100 for what is not allowed"),
    "audio": Neutral((), _TEXT_ONLY),
    "bad_words": Neutral(([],), "words can't be banned; leave it out"),
    "chat_template": Neutral(("",), "the model's own chat template is used; leave it out"),
    "documents": Neutral(([],), "put them into the messages"),
    "function_call": Neutral(("none", "auto"), _FUNCTIONS),
    "functions": Neutral(([],), _FUNCTIONS),
    "logits_processors": Neutral(([],), "no code is taken from clients; leave it out"),
    "modalities": Neutral(([], ["text"]), _TEXT_ONLY),
    "prediction": Neutral((), "it is not built yet; leave it out"),
    "priority": Neutral((0,), "requests are served in the order of their arrival; leave it out"),
    "prompt_embeds": Neutral(([], ""), _NO_EMBEDDINGS),
    "prompt_logprobs": Neutral((False,), "ask /v1/completions with `echo` and `logprobs`"),
    "return_token_ids": Neutral(OFF, "answers hold text; leave it out"),
    "return_tokens_as_token_ids": Neutral(OFF, "log probabilities name tokens by their text; leave it out"),
    "suffix": Neutral(("",), "text can't be inserted before a suffix; leave it out"),
    "truncate_prompt_tokens": Neutral((), "prompts are not cut; send a shorter one"),
    "use_beam_search": Neutral(OFF, "there is no beam search; leave it out"),
    "web_search_options": Neutral((), "there is no web search; leave it out"),
}


def check_neutral(body: Mapping[str, Any], refused: Mapping[str, Neutral]) -> None:
    """
    Raises:
        ApiError: 400, a field asks for what can't be done.
    """
    for name in refused.keys() & body.keys():
        value = body[name]
        if value is not None and not any(_same(value, neutral) for neutral in refused[name].values):
            raise unsupported(name, refused[name].why)


def _same(value: object, neutral: object) -> bool:
    """1 is 1.0 and not true."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def schema_of(refused: Mapping[str, Neutral]) -> dict[str, Any]:
    """As JSON Schema properties."""
    return {
        name: {
            "title": name,
            "description": f"Not supported: {one.why}. Taken with a value that asks for nothing.",
            "enum": [None, *one.values],
        }
        for name, one in refused.items()
    }
