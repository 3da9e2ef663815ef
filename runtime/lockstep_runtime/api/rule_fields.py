"""Fields that change logits before a token is drawn, with OpenAI's and vLLM's meaning and bounds.

Source: https://platform.openai.com/docs/api-reference/chat/create, vLLM's `SamplingParams` for the others.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from lockstep_runtime.api.errors import invalid
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.protocol.step import Grammar, LogitRules

MAX_BIASES: Final = 1024
MOST_BIAS: Final = 100.0
LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0  # beyond, logits overflow
_BIAS_SCHEMA: Final = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
            "maxProperties": MAX_BIASES,
        },
        {"type": "null"},
    ]
}


def _biases(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("Input should be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise ValueError(f"Object should have at most {MAX_BIASES} tokens, not {len(value)}")
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10):
            raise ValueError(f"{str(token)[:40]!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MOST_BIAS <= bias <= MOST_BIAS:
            raise ValueError(f"The bias of token {token} should be a number from -100 to 100")
    return {int(token): float(bias) for token, bias in value.items()}


class RuleFields(BaseModel):
    """Part of every request for tokens."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=LEAST_REPETITION, le=MOST_REPETITION, description="1: off")
    logit_bias: Annotated[dict[int, float] | None, PlainValidator(_biases), WithJsonSchema(_BIAS_SCHEMA)] = None
    min_tokens: int | None = Field(
        None, ge=0, lt=2**31, description="drawn before the end of text, a stop token or a stop string counts"
    )


def rules_of(
    request: RuleFields, model: ServedModel, stop_ids: Set[int], grammar: Grammar | None = None
) -> LogitRules | None:
    """What the request and the model's defaults ask for; None: nothing.

    Args:
        stop_ids: the request's own, and the model's even where the request ignores these.
        grammar: what the answer must match.

    Raises:
        ApiError: 400, a bias is for a token that the model doesn't have.
    """
    biases = request.logit_bias or {}
    rows = model.tokenizer.size if model.vocabulary is None else model.vocabulary
    if biases and max(biases) >= rows:
        message = f"logit_bias: the model knows no token {max(biases)}: it has {rows}"
        raise invalid(message, "logit_bias", "unknown_token")
    repetition = request.repetition_penalty
    rules = LogitRules(
        bias=biases,
        min_tokens=request.min_tokens or 0,
        end_ids=sorted(one for one in stop_ids if one < rows) if request.min_tokens else [],
        repetition_penalty=model.defaults.repetition_penalty if repetition is None else repetition,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        grammar=grammar,
    )
    return None if rules == LogitRules() else rules
