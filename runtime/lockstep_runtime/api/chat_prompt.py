"""A conversation's prompt: the model's template rendered to token ids, and whether that leaves the model thinking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep_runtime.api.chat import encode_chat
from lockstep_runtime.api.chat_template import Chat
from lockstep_runtime.api.errors import invalid, unsupported
from lockstep_runtime.api.images.content import text_of
from lockstep_runtime.api.images.placement import place_images
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.api.model import ServedModel
from lockstep_runtime.api.reasoning import is_open, opens_in
from lockstep_runtime.api.schemas import Conversation
from lockstep_runtime.engine.client import PromptImage
from lockstep_runtime.protocol.images import Pixels


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """
    `thinks`: the template, or the message that is continued, has opened the reasoning.
    `continues`: the answer goes on with the last message.
    """

    ids: list[int]
    thinks: bool
    continues: bool
    images: tuple[PromptImage, ...] = ()


def chat_prompt(
    model: ServedModel, request: Conversation, limits: Limits, *, most: int, images: Sequence[Pixels] = ()
) -> ChatPrompt:
    """Blocks (template, tokenizer): run it in a thread.

    Args:
        most: tokens, before images take their places.
        images: of the conversation's `image_urls`.

    Raises:
        ApiError: 400, the model has no template, or its template refuses the messages.
        TooManyTokensError: see `TextTokenizer.encode`.
    """
    if model.template is None:
        raise invalid(model.why_no_template, "messages")
    tools = request.offered_tools
    if tools:
        _check_tools(model)
    template, tokenizer = (model.tool_template if tools else None) or model.template, model.tokenizer
    chat = Chat(
        messages=[message.for_template(objects=model.tools.objects) for message in request.messages],
        tools=tools,
        variables=request.template_variables(),
        add_generation_prompt=request.add_generation_prompt is not False and not request.continue_final_message,
        continues=bool(request.continue_final_message),
    )
    seconds, limit = limits.render_seconds, limits.max_prompt_chars
    special = bool(request.add_special_tokens)
    ids = encode_chat(template, tokenizer, chat, seconds=seconds, limit=limit, most=most, add_special_tokens=special)
    ids, placed = place_images(ids, images, model.images) if images else (ids, ())
    if chat.continues:
        thinks = model.markers is not None and opens_in(text_of(request.messages[-1].content))
        return ChatPrompt(ids, thinks, continues=True, images=placed)
    thinks = is_open(model.markers, template, tokenizer, chat, ids, seconds=seconds, limit=limit)
    return ChatPrompt(ids, thinks, continues=False, images=placed)


def _check_tools(model: ServedModel) -> None:
    if not model.tools.shown:
        raise unsupported("tools", "this model's chat template tells the model of none")
    if model.tools.format is None:
        raise unsupported("tools", "how this model writes calls is not known; choose a --tool-call-parser")
