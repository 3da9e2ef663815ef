"""/tokenize and /detokenize: what the model is given for a text or a conversation, and the text of token ids.

Source: `TokenizeRequest` and `DetokenizeRequest` of vLLM's server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final

import msgspec
from pydantic import BaseModel, BeforeValidator, Field

from lockstep_runtime.api.chat_prompt import chat_prompt
from lockstep_runtime.api.errors import invalid, too_long
from lockstep_runtime.api.lenient import Flag, wholes
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.api.neutral import REFUSED, Neutral
from lockstep_runtime.api.schemas import Body, Conversation, validate
from lockstep_runtime.api.tokenizer import TooManyTokensError
from lockstep_runtime.protocol.images import Pixels

MAX_TOKENS: Final = 262_144  # or the model's, if those are more: the library makes a list of them in one go


class _Asked(Body):
    model: str | None = Field(None, description="default: the one that is served")


class TokenizeText(_Asked):
    prompt: str
    add_special_tokens: Flag = Field(None, description="such as a beginning of text; default: true")
    return_token_strs: Flag = Field(None, description="also each token's text")


class TokenizeChat(_Asked, Conversation):
    REFUSED: ClassVar[Mapping[str, Neutral]] = {"chat_template": REFUSED["chat_template"]}

    return_token_strs: Flag = Field(None, description="also each token's text")


def _ids(value: object) -> object:
    """At once: there may be 300,000 of them."""
    ids = wholes(value)
    if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError("Input should be a list of token ids")
    return ids


class Detokenize(_Asked):
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_ids)]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    prompt: str


def parse_tokenize(body: dict[str, Any]) -> TokenizeText | TokenizeChat:
    """
    Raises:
        ApiError: 400 that names the field.
    """
    return validate(TokenizeChat, body) if "messages" in body else validate(TokenizeText, body)


def tokenize(
    model: ServedModel,
    asked: TokenizeText | TokenizeChat,
    limits: Limits,
    max_model_len: int,
    images: Sequence[Pixels] = (),
) -> bytes:
    """Blocks: run it in a thread.

    Raises:
        ApiError: 400, the text has too many tokens; see also `chat_prompt`.
    """
    tokenizer, most = model.tokenizer, max(MAX_TOKENS, max_model_len)
    try:
        if isinstance(asked, TokenizeChat):
            ids = chat_prompt(model, asked, limits, most=most, images=images).ids
        else:
            special = asked.add_special_tokens is not False
            ids = tokenizer.encode(asked.prompt, add_special_tokens=special, most=most)
    except TooManyTokensError as error:
        raise too_long(f"At most {most} tokens are counted at once, but there are {error}: send parts") from None
    strings = [tokenizer.token_of(id) or "" for id in ids] if asked.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": strings}
    return msgspec.json.encode(answer)


def detokenize(model: ServedModel, asked: Detokenize) -> bytes:
    """Blocks: run it in a thread.

    Raises:
        ApiError: 400, there is no such token.
    """
    greatest, size = max(asked.tokens, default=0), model.tokenizer.size
    if greatest >= size:
        raise invalid(f"tokens: token id {greatest} is beyond {size - 1}", "tokens", "unknown_token")
    return msgspec.json.encode({"prompt": model.tokenizer.decode_many(asked.tokens)})
