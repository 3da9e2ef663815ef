"""What schemathesis is told of this API: how to ask for little, and what a schema can't say."""

from __future__ import annotations

from typing import Any, Final

import schemathesis

LITTLE: Final = 2  # tokens of an answer, choices of a prompt, prompts
VOCABULARY: Final = 256  # of any model's tokens, the first
MOST: Final = {"max_tokens": 2**31 - 1, "max_completion_tokens": 2**31 - 1, "min_tokens": 2**31 - 1, "n": 16}
MAX_PROMPTS: Final = 128
# What depends on the model, or on several fields together.
BEYOND_A_SCHEMA: Final = frozenset({"context_length_exceeded", "images_not_supported", "unknown_token"})
TOGETHER: Final = frozenset(
    {"best_of", "continue_final_message", "min_tokens", "n", "stream_options", "tool_choice", "top_logprobs"}
)
# And what a text means: whether a regex is one, and a schema can be followed. An answer has one form.
FORMS: Final = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
)  # fmt: skip


class RefusedError(schemathesis.core.failures.Failure):
    """A request that the document allows was refused."""


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Valid requests ask for few tokens that the model knows, so that most are answered, and quickly. What is beyond a
    bound of the schema stays there."""
    if not isinstance(body, dict):
        return body
    few = {name: _few(body[name], most) for name, most in MOST.items() if name in body}
    if few.get("max_tokens") is None and few.get("max_completion_tokens") is None:
        few["max_tokens"] = LITTLE
    known = {name: _known(body[name]) for name in ("prompt", "tokens") if name in body}
    further_forms = [name for name in FORMS if body.get(name) is not None][1:]
    return {name: value for name, value in (body | few | known).items() if name not in further_forms}


@schemathesis.check
def what_the_document_allows_is_answered(context: Any, response: Any, case: Any) -> None:
    """Valid requests are answered, but those that a schema can't tell from others."""
    if response.status_code < 400 or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    error = response.json()["error"]
    if error["code"] not in BEYOND_A_SCHEMA and error["param"] not in TOGETHER.union(FORMS):
        raise RefusedError(operation=case.operation.label, message=error["message"], title="A valid request is refused")


def _few(value: Any, most: int) -> Any:
    return value % LITTLE + 1 if type(value) in (int, float) and LITTLE < value <= most else value


def _known(prompt: Any) -> Any:
    if isinstance(prompt, list):
        several = len(prompt) <= MAX_PROMPTS and any(isinstance(one, str | list) for one in prompt)
        return [_known(one) for one in (prompt[:LITTLE] if several else prompt)]
    return prompt % VOCABULARY if type(prompt) in (int, float) and prompt >= VOCABULARY else prompt
