"""A conversation's prompt: the model's template rendered to token ids, and whether that leaves the model thinking."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_runtime.api.chat import encode_chat
from lockstep_runtime.api.chat_template import Chat
from lockstep_runtime.api.errors import invalid
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.api.reasoning import is_open
from lockstep_runtime.api.schemas import ChatRequest


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """`thinks`: the template has opened the reasoning."""

    ids: list[int]
    thinks: bool


def chat_prompt(model: ServedModel, request: ChatRequest, limits: Limits, *, most: int) -> ChatPrompt:
    """Blocks (template, tokenizer): run it in a thread.

    Args:
        most: tokens.

    Raises:
        ApiError: 400, the model has no template, or its template refuses the messages.
        TooManyTokensError: see `TextTokenizer.encode`.
    """
    template, tokenizer = model.template, model.tokenizer
    if template is None:
        raise invalid(model.why_no_template, "messages")
    chat = Chat(
        messages=[message.for_template() for message in request.messages],
        variables=request.template_variables(),
        add_generation_prompt=request.add_generation_prompt is not False,
    )
    seconds, limit = limits.render_seconds, limits.max_prompt_chars
    ids = encode_chat(template, tokenizer, chat, seconds=seconds, limit=limit, most=most)
    thinks = is_open(model.markers, template, tokenizer, chat, ids, seconds=seconds, limit=limit)
    return ChatPrompt(ids, thinks)
