"""The chat template gives what transformers gives, and users' text makes no special tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.api_server import TINY_CHAT
from transformers import AutoTokenizer

from lockstep_runtime.api.chat import encode_chat
from lockstep_runtime.api.chat_template import Chat, ChatTemplate
from lockstep_runtime.api.errors import ApiError
from lockstep_runtime.api.tokenizer import TextTokenizer

TOKENIZER = TextTokenizer.from_file(TINY_CHAT / "tokenizer.json")
ORACLE: Any = AutoTokenizer.from_pretrained(TINY_CHAT)
OWN = (TINY_CHAT / "chat_template.jinja").read_text()
TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
# What templates of the Qwen family use: namespaces, reversed lists, loop variables, filters, tests, defaults.
RICH = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and ns.last < 0 %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ raise_exception("no tools") }}{% endif %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
{{- '<|im_start|>system\n' + message.content.strip() + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' and message.reasoning_content is string and loop.index0 > ns.last %}
{{- '<|im_start|>assistant\n<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
{{- message.content.split('</think>')[-1].lstrip('\n') + eos_token + '\n' }}
    {%- else %}
{{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>' }}
{{ {"n": loop.index, "what": message.content} | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""


def encode(source: str, chat: Chat, *, limit: int = 100_000, seconds: float = 5) -> list[int]:
    return encode_chat(ChatTemplate(source, TOKENS), TOKENIZER, chat, seconds=seconds, limit=limit, most=10**6)


def expected(source: str, chat: Chat) -> list[int]:
    found: list[int] = ORACLE.apply_chat_template(
        chat.messages,
        chat_template=source,
        add_generation_prompt=chat.add_generation_prompt,
        tokenize=True,
        return_dict=False,
        **chat.variables,
    )
    return found


TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("🎉日本 \n\"'<>&{}%"), max_size=40).filter(
    lambda text: "<|" not in text  # else it may be a special token, see below
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS},
        optional={"reasoning_content": TEXTS},
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("source", [OWN, RICH])
@given(MESSAGES, st.booleans(), st.sampled_from([{}, {"enable_thinking": False}, {"enable_thinking": True}]))
@settings(max_examples=150, deadline=None)
def test_token_for_token_as_transformers(
    source: str, messages: list[dict[str, str]], prompt: bool, variables: dict[str, object]
) -> None:
    chat = Chat(messages=messages, variables=variables, add_generation_prompt=prompt)
    assert encode(source, chat) == expected(source, chat)


SPECIAL_TEXTS = st.lists(
    st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|", "|>", "im_end", " ", "a", "\ufdd0", "🎉"])
).map("".join)


@given(SPECIAL_TEXTS, SPECIAL_TEXTS)
@settings(deadline=None)
def test_users_text_makes_no_special_tokens_and_stays_the_same_text(first: str, second: str) -> None:
    chat = Chat(messages=[{"role": "user", "content": first}, {"role": "user", "content": second}])
    ids = encode(OWN, chat)
    markup = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert [id for id in ids if id in TOKENIZER.special_ids] == [TOKENIZER.id_of(token) for token in markup]
    text = f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>user\n{second}<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(ids) == text


def test_variables_make_no_special_tokens_either() -> None:
    chat = Chat(messages=[{"role": "user", "content": "a"}], variables={"style": "<|im_end|>"})
    assert encode("{{ style }}", chat) != [TOKENIZER.id_of("<|im_end|>")]
    assert TOKENIZER.decode(encode("{{ style }}", chat)) == "<|im_end|>"


def refusal(source: str, chat: Chat | None = None, **bounds: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        encode(source, chat or Chat(messages=[{"role": "user", "content": "hello"}]), **bounds)
    assert error.value.status == 400
    return error.value


def test_a_template_may_refuse_in_its_own_words() -> None:
    assert "roles must alternate" in refusal("{{ raise_exception('roles must alternate') }}").message


def test_a_template_that_fails_is_about_the_messages() -> None:
    error = refusal("{{ messages[0].content + 1 }}")
    assert (error.param, "TypeError" in error.message) == ("messages", True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",  # immutable
        "{{ messages.__class__.__mro__ }}",  # no way to Python's inside
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10000000) %}a{% endfor %}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    refusal(source)


def test_a_template_may_not_take_long() -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = messages[0] %}{% endfor %}{% endfor %}"
    assert "longer than 0.05 s" in refusal(endless, seconds=0.05).message


def test_a_template_may_not_make_much() -> None:
    assert "more than 1000 characters" in refusal("{% for i in range(99999) %}aaaa{% endfor %}", limit=1000).message


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "eos_token"])
def test_variables_may_not_replace_what_the_template_is_given(name: str) -> None:
    chat = Chat(messages=[{"role": "user", "content": "a"}], variables={name: "x"})
    assert refusal(OWN, chat).param == "chat_template_kwargs"


def test_a_message_of_parts_is_continued_after_its_last_text() -> None:
    source = "{% for part in messages[0].content %}[{{ part.text if part.text else part.type }}]{% endfor %}"
    text, image = {"type": "text", "text": "a "}, {"type": "image"}
    for parts, shown in (([image, text], "[image][a "), ([text, image], "[a "), ([text, text], "[a ][a ")):
        chat = Chat(messages=[{"role": "assistant", "content": parts}], add_generation_prompt=False, continues=True)
        assert TOKENIZER.decode(encode(source, chat)) == shown
    chat = Chat(messages=[{"role": "assistant", "content": [image]}], add_generation_prompt=False, continues=True)
    assert refusal(source, chat).param == "continue_final_message"


def test_the_time_is_there() -> None:
    ids = encode("{{ strftime_now('%Y') }}", Chat(messages=[]))
    assert json.loads(TOKENIZER.decode(ids)) >= 2024
